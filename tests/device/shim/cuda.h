// The part of CUDA's driver API that csrc/cuda/row_space.cu uses, over Linux: physical memory is a memfd, which may be
// mapped at several addresses, as on a GPU.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_OUT_OF_MEMORY = 2, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUmemAllocationType { CU_MEM_ALLOCATION_TYPE_PINNED = 1 };
enum CUmemLocationType { CU_MEM_LOCATION_TYPE_DEVICE = 1 };
enum CUmemAccessFlags { CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3 };
enum CUdeviceAttribute { CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102 };
enum CUmemGranularity { CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0 };
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUmemGenericAllocationHandle = unsigned long long;
struct CUmemLocation {
  CUmemLocationType type;
  int id;
};
struct CUmemAllocationProp {
  CUmemAllocationType type;
  CUmemLocation location;
};
struct CUmemAccessDesc {
  CUmemLocation location;
  CUmemAccessFlags flags;
};

constexpr size_t kShimPage = 4096;

inline void* shim_address(CUdeviceptr at) {
  return reinterpret_cast<void*>(at);
}
inline CUresult shim_map(CUdeviceptr at, size_t size, int protection, int flags, int file) {
  const bool done = mmap(shim_address(at), size, protection, flags | MAP_FIXED, file, 0) != MAP_FAILED;
  return done ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
inline CUresult cuDeviceGetAttribute(int* value, CUdeviceAttribute, CUdevice) {
  *value = 1;
  return CUDA_SUCCESS;
}
inline CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "refused by the shim";
  return CUDA_SUCCESS;
}
inline CUresult cuMemGetAllocationGranularity(size_t* size, const CUmemAllocationProp*, CUmemGranularity) {
  *size = kShimPage;
  return CUDA_SUCCESS;
}
inline CUresult cuMemAddressReserve(CUdeviceptr* at, size_t size, size_t, CUdeviceptr, unsigned long long) {
  if (size % kShimPage) return CUDA_ERROR_INVALID_VALUE;
  void* found = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *at = reinterpret_cast<CUdeviceptr>(found);
  return found == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
inline CUresult cuMemAddressFree(CUdeviceptr at, size_t size) {
  return munmap(shim_address(at), size) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
inline CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp*,
                            unsigned long long) {
  const int file = memfd_create("shim", 0);
  if (file < 0 || size == 0 || size % kShimPage || ftruncate(file, static_cast<off_t>(size))) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  *handle = static_cast<CUmemGenericAllocationHandle>(file);
  return CUDA_SUCCESS;
}
inline CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  return close(static_cast<int>(handle)) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
// Nobody may read or write there before cuMemSetAccess.
inline CUresult cuMemMap(CUdeviceptr at, size_t size, size_t, CUmemGenericAllocationHandle handle, unsigned long long) {
  return shim_map(at, size, PROT_NONE, MAP_SHARED, static_cast<int>(handle));
}
inline CUresult cuMemSetAccess(CUdeviceptr at, size_t size, const CUmemAccessDesc*, size_t) {
  return mprotect(shim_address(at), size, PROT_READ | PROT_WRITE) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
inline CUresult cuMemUnmap(CUdeviceptr at, size_t size) {
  return shim_map(at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
}
