// VEP_HD: what a function is marked with that both the host and a GPU call. VEP_PRAGMA: a hint that only nvcc knows.
#pragma once

#ifdef __CUDACC__
#define VEP_HD __host__ __device__
#define VEP_PRAGMA(text) _Pragma(#text)
#else
#define VEP_HD
#define VEP_PRAGMA(text)
#endif
