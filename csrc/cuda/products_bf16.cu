#include "products_launch.cuh"

template cudaError_t cai::launch_products(Store, const Rows<__nv_bfloat16>&, const Group&, cudaStream_t);
