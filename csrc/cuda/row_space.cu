// GPU memory that is mapped at several addresses: what the rows of an expert tensor are made of. CUDA's virtual memory
// management, through driver entry points, so that the library loads where there is no driver.

#include <cuda.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/memory.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/tvm_ffi.h>

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tensors.cuh"

namespace vep {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Object;
using tvm::ffi::ObjectRef;
using tvm::ffi::Tensor;

// `Function` is the type of a driver function such as cuMemCreate.
template <class Function>
Function* driver_function(const char* name) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint(name, &address, cudaEnableDefault, &found);
#endif
  TVM_FFI_CHECK(status == cudaSuccess && found == cudaDriverEntryPointSuccess && address, RuntimeError)
      << "the NVIDIA driver has no " << name << ": update it";
  return reinterpret_cast<Function*>(address);
}

struct Driver {
#define VEP_DRIVER(name) decltype(::name)* name = driver_function<decltype(::name)>(#name)
  VEP_DRIVER(cuDeviceGetAttribute);
  VEP_DRIVER(cuGetErrorString);
  VEP_DRIVER(cuMemAddressFree);
  VEP_DRIVER(cuMemAddressReserve);
  VEP_DRIVER(cuMemCreate);
  VEP_DRIVER(cuMemGetAllocationGranularity);
  VEP_DRIVER(cuMemMap);
  VEP_DRIVER(cuMemRelease);
  VEP_DRIVER(cuMemSetAccess);
  VEP_DRIVER(cuMemUnmap);
#undef VEP_DRIVER

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  void check(CUresult status, const std::string& what) const {
    if (status == CUDA_SUCCESS) return;
    const char* reason = nullptr;
    cuGetErrorString(status, &reason);
    TVM_FFI_THROW(RuntimeError) << what << ": " << (reason ? reason : "unknown error");
  }
};

CUmemAllocationProp memory_of(int device) {
  CUmemAllocationProp wanted{};
  wanted.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  wanted.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  wanted.location.id = device;
  return wanted;
}

std::atomic<int64_t> bytes_taken{0};

// Physical memory of one device, not mapped anywhere. The driver frees it when neither this nor a mapping is left.
class MemoryObj : public Object {
 public:
  MemoryObj(int64_t num_bytes, int device) : size(static_cast<size_t>(num_bytes)), device(device) {
    const CUmemAllocationProp wanted = memory_of(device);
    const Driver& driver = Driver::get();
    driver.check(driver.cuMemCreate(&handle, size, &wanted, 0),
                 "no " + std::to_string(num_bytes) + " bytes of GPU memory for expert rows");
    bytes_taken += num_bytes;
  }
  ~MemoryObj() {
    Driver::get().cuMemRelease(handle);
    bytes_taken -= static_cast<int64_t>(size);
  }

  const size_t size;
  const int device;
  CUmemGenericAllocationHandle handle{};

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("vep.RowMemory", MemoryObj, Object);
};

class Memory : public ObjectRef {
 public:
  Memory(int64_t num_bytes, int device) : ObjectRef(tvm::ffi::make_object<MemoryObj>(num_bytes, device)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Memory, ObjectRef, MemoryObj);
};

// One range of addresses over several memories, one behind the other. Gone with the last tensor over it.
class Range {
 public:
  explicit Range(std::vector<Memory> parts) : device_(parts.front()->device) {
    const Driver& driver = Driver::get();
    for (const Memory& part : parts) size_ += part->size;
    driver.check(driver.cuMemAddressReserve(&start_, size_, 0, 0, 0),
                 "no " + std::to_string(size_) + " bytes of GPU addresses for expert rows");
    try {
      for (Memory& part : parts) map(driver, std::move(part));
    } catch (...) {
      release();
      throw;
    }
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
  ~Range() { release(); }

  void* start() const { return reinterpret_cast<void*>(start_); }
  int64_t size() const { return static_cast<int64_t>(size_); }
  int device() const { return device_; }

 private:
  void map(const Driver& driver, Memory part) {
    const CUdeviceptr at = start_ + mapped_;
    driver.check(driver.cuMemMap(at, part->size, 0, part->handle, 0), "cannot map GPU memory for expert rows");
    mapped_ += part->size;
    parts_.push_back(std::move(part));
    CUmemAccessDesc access{};
    access.location = memory_of(device_).location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    driver.check(driver.cuMemSetAccess(at, parts_.back()->size, &access, 1), "cannot use GPU memory for expert rows");
  }

  // Nothing is checked here: the driver may be gone at exit.
  void release() {
    const Driver& driver = Driver::get();
    CUdeviceptr at = start_;
    for (const Memory& part : parts_) {
      driver.cuMemUnmap(at, part->size);
      at += part->size;
    }
    driver.cuMemAddressFree(start_, size_);
  }

  int device_;
  size_t size_ = 0, mapped_ = 0;
  CUdeviceptr start_ = 0;
  std::vector<Memory> parts_;
};

// Of a tensor over a Range.
struct Keeper {
  std::shared_ptr<Range> range;
  void AllocData(DLTensor* tensor) { tensor->data = range->start(); }
  void FreeData(DLTensor*) {
    try {
      tvm::ffi::CUDADeviceGuard guard(range->device());
      cudaDeviceSynchronize();          // a kernel may still be reading
    } catch (const tvm::ffi::Error&) {  // CUDA is gone already, and all memory with it
    }
  }
};

// Bytes that can be mapped at least. RuntimeError where the GPU, or its driver, cannot map memory.
int64_t Granularity(int64_t device) {
  tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device));
  check_cuda(cudaFree(nullptr), "CUDA context");
  const Driver& driver = Driver::get();
  int is_supported = 0;
  driver.check(driver.cuDeviceGetAttribute(&is_supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
                                           static_cast<CUdevice>(device)),
               "virtual memory management");
  TVM_FFI_CHECK(is_supported, RuntimeError) << "GPU " << device << " does not support CUDA's virtual memory management";
  const CUmemAllocationProp wanted = memory_of(static_cast<int>(device));
  size_t granularity = 0;
  driver.check(driver.cuMemGetAllocationGranularity(&granularity, &wanted, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
               "granularity of GPU memory");
  return static_cast<int64_t>(granularity);
}

// `num_bytes`: a multiple of the granularity.
Memory Create(int64_t num_bytes, int64_t device) {
  tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device));
  return Memory(num_bytes, static_cast<int>(device));
}

// uint8 over `parts` of one device, one behind the other, all zero from here on.
Tensor Map(Array<Memory> parts) {
  TVM_FFI_CHECK(!parts.empty(), ValueError) << "a range needs memory";
  tvm::ffi::CUDADeviceGuard guard(parts[0]->device);
  auto range = std::make_shared<Range>(std::vector<Memory>(parts.begin(), parts.end()));
  check_cuda(cudaMemset(range->start(), 0, static_cast<size_t>(range->size())), "zeroing expert rows");
  check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "zeroing expert rows");
  const int64_t size = range->size();
  const DLDevice device{kDLCUDA, range->device()};
  return Tensor::FromNDAlloc(Keeper{std::move(range)}, {size}, DLDataType{kDLUInt, 8, 1}, device);
}

int64_t BytesTaken() {
  return bytes_taken;
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_space_granularity, vep::Granularity);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_space_create, vep::Create);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_space_map, vep::Map);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_space_bytes, vep::BytesTaken);
