#include "products_launch.cuh"

template cudaError_t cai::launch_products(Store, const Rows<__half>&, const Group&, cudaStream_t);
