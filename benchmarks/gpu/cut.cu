// How launches of the CUDA decode kernel are cut up: the library's own plan, on the host alone. Reads lines of
//   store group zero x-rows prologue multiprocessors members (rows cols x_col)...
// and writes of each "cluster blocks groups bytes slot_bytes".
#include <iostream>
#include <sstream>
#include <string>

#include "cuda/dispatch.cuh"

int main() {
  using T = __nv_bfloat16;
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
    cai::with_store<T>(kind, [&](auto w) {
      cai::Cut cut = cai::cut_launch<T, decltype(w)>(rows, group, cai::kHopper);
      cai::choose_blocks(cut, multiprocessors / cut.cluster);
      std::cout << cut.cluster << ' ' << cut.blocks << ' ' << cut.groups << ' ' << cut.bytes << ' ' << cut.slot_bytes
                << std::endl;
    });
  }
}
