// VEP_HD: what a function is marked with that both the host and a GPU call.
#pragma once

#ifdef __CUDACC__
#define VEP_HD __host__ __device__
#else
#define VEP_HD
#endif
