// GPU memory that is mapped at several addresses: what the rows of an expert tensor are made of. CUDA's virtual memory
// management, through driver entry points, so that the library loads where there is no driver.

#include <cuda.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/memory.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/tvm_ffi.h>

#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include "tensors.cuh"

namespace vep {
namespace {

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

// Addresses, and the memories that are mapped there one behind the other. Gone with the last tensor over them.
class RangeObj : public Object {
 public:
  RangeObj(int64_t num_bytes, int device) : size(static_cast<size_t>(num_bytes)), device(device) {
    const Driver& driver = Driver::get();
    driver.check(driver.cuMemAddressReserve(&start_, size, 0, 0, 0),
                 "no " + std::to_string(size) + " bytes of GPU addresses for expert rows");
  }
  // Nothing is checked here: the driver may be gone at exit.
  ~RangeObj() {
    const Driver& driver = Driver::get();
    CUdeviceptr at = start_;
    for (const Memory& part : parts_) {
      driver.cuMemUnmap(at, part->size);
      at += part->size;
    }
    driver.cuMemAddressFree(start_, size);
  }

  void* start() const { return reinterpret_cast<void*>(start_); }
  size_t mapped() const { return mapped_; }

  // Zero from here on.
  void push(Memory part) {
    TVM_FFI_CHECK(part->device == device && part->size <= size - mapped_, ValueError)
        << part->size << " bytes of GPU " << part->device << " do not fit behind " << mapped_ << " of " << size
        << " on GPU " << device;
    const Driver& driver = Driver::get();
    const CUdeviceptr at = start_ + mapped_;
    driver.check(driver.cuMemMap(at, part->size, 0, part->handle, 0), "cannot map GPU memory for expert rows");
    mapped_ += part->size;
    parts_.push_back(std::move(part));
    CUmemAccessDesc access{};
    access.location = memory_of(device).location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    driver.check(driver.cuMemSetAccess(at, parts_.back()->size, &access, 1), "cannot use GPU memory for expert rows");
    check_cuda(cudaMemset(reinterpret_cast<void*>(at), 0, parts_.back()->size), "zeroing expert rows");
    check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "zeroing expert rows");
  }

  // Unmaps what was pushed last.
  void pop() {
    TVM_FFI_CHECK(!parts_.empty(), ValueError) << "nothing is mapped in this range";
    check_cuda(cudaDeviceSynchronize(), "kernels that may read expert rows");
    const Driver& driver = Driver::get();
    const size_t last = parts_.back()->size;
    driver.check(driver.cuMemUnmap(start_ + mapped_ - last, last), "cannot unmap GPU memory of expert rows");
    mapped_ -= last;
    parts_.pop_back();
  }

  const size_t size;
  const int device;

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("vep.RowRange", RangeObj, Object);

 private:
  size_t mapped_ = 0;
  CUdeviceptr start_ = 0;
  std::vector<Memory> parts_;
};

class Range : public ObjectRef {
 public:
  Range(int64_t num_bytes, int device) : ObjectRef(tvm::ffi::make_object<RangeObj>(num_bytes, device)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Range, ObjectRef, RangeObj);
};

// Of a tensor over a Range.
struct Keeper {
  Range range;
  void AllocData(DLTensor* tensor) { tensor->data = range->start(); }
  void FreeData(DLTensor*) {
    try {
      tvm::ffi::CUDADeviceGuard guard(range->device);
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

// Addresses for `num_bytes`, a multiple of the granularity; nothing is mapped there.
Range Reserve(int64_t num_bytes, int64_t device) {
  TVM_FFI_CHECK(num_bytes > 0, ValueError) << "a range needs a size";
  tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device));
  return Range(num_bytes, static_cast<int>(device));
}

void Push(Range range, Memory memory) {
  tvm::ffi::CUDADeviceGuard guard(range->device);
  range->push(std::move(memory));
}

void Pop(Range range) {
  tvm::ffi::CUDADeviceGuard guard(range->device);
  range->pop();
}

// uint8 over the whole range, where memory is mapped everywhere.
Tensor TensorOver(Range range) {
  TVM_FFI_CHECK(range->mapped() == range->size, ValueError) << "a range needs memory";
  const DLDevice device{VEP_DEVICE_TYPE, range->device};
  const int64_t size = static_cast<int64_t>(range->size);
  return Tensor::FromNDAlloc(Keeper{std::move(range)}, {size}, DLDataType{kDLUInt, 8, 1}, device);
}

int64_t BytesTaken() {
  return bytes_taken;
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_space_granularity, vep::Granularity);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_space_create, vep::Create);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_space_reserve, vep::Reserve);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_space_push, vep::Push);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_space_pop, vep::Pop);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_space_tensor, vep::TensorOver);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_space_bytes, vep::BytesTaken);
