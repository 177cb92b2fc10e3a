// How launches of the CUDA linears are cut up: the library's own plan, on the host alone. Reads lines of
//   store group zero x-rows prologue multiprocessors members (rows cols x_col)...
// and writes of each "cluster blocks groups bytes slot_bytes", beyond kMaxRows rows of x "cluster blocks groups bytes stage_bytes
// stages row_blocks x-rows-of-a-block".
#include <iostream>
#include <sstream>
#include <string>

#include "cuda/dispatch.cuh"

using T = __nv_bfloat16;

struct Print {
  template <typename W, int kRows, bool kSplit>
  cudaError_t run(const cai::ManyRows<T>&, const cai::Group&, const cai::ManyCut& cut) const {
    std::cout << (kSplit ? cai::kParts : cai::kShared) << ' ' << cut.blocks << ' ' << cut.groups << ' ' << cut.bytes << ' '
              << cut.stage_bytes << ' ' << cut.stages << ' ' << cut.row_blocks << ' ' << kRows << std::endl;
    return cudaSuccess;
  }
};

int main() {
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    int store = 0, columns = 0, zero = 0, prologue = 0, multiprocessors = 0;
    cai::Rows<T> rows{};
    cai::Group group{};
    in >> store >> columns >> zero >> rows.count >> prologue >> multiprocessors >> group.count;
    rows.prologue = static_cast<cai::Prologue>(prologue);
    const cai::Kind kind{static_cast<cai::Store>(store), columns, zero != 0};
    for (int i = 0; i < group.count; ++i) {
      cai::Product& p = group.product[i];
      in >> p.rows >> p.cols >> p.x_col;
      cai::measure<T>(kind, p);
    }
    if (rows.count > cai::kMaxRows) {
      cai::ManyRows<T> many{};
      many.count = rows.count;
      cai::launch_many_rows(kind, many, group, cai::ManyDevice{cai::kHopper, multiprocessors, cai::kHopperDevice.clusters, true}, Print{});
      continue;
    }
    cai::with_store<T>(kind, [&](auto w) {
      cai::Cut cut = cai::cut_launch<T, decltype(w)>(rows, group, cai::kHopper);
      cai::choose_blocks(cut, multiprocessors / cut.cluster);
      std::cout << cut.cluster << ' ' << cut.blocks << ' ' << cut.groups << ' ' << cut.bytes << ' ' << cut.slot_bytes
                << std::endl;
    });
  }
}
