// The part of CUDA's runtime API that csrc/cuda uses, over threads: what is launched on stream 0 runs at once, what is
// launched on any other stream is queued for one thread that runs it in order. A kernel's blocks run one after the
// other, each as one thread. Page-locked memory is ordinary memory that was registered.
//
// What this cannot show: times, the memory order of a GPU, blocks that run side by side, and capture (tests/gpu does).
#pragma once

#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda.h"
#include "cuda_on_host.h"

#define CUDART_VERSION 13000
#define VEP_DEVICE_TYPE kDLCPU

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {};
using cudaStream_t = void*;
constexpr unsigned cudaEnableDefault = 0;
inline const cudaStream_t cudaStreamLegacy = nullptr;

// A stream other than 0.
class ShimQueue {
 public:
  static ShimQueue& get() {
    static ShimQueue* queue = new ShimQueue;  // lives as long as its thread
    return *queue;
  }
  void push(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    work_.push_back(std::move(work));
    ++submitted_;
    changed_.notify_all();
  }
  int64_t submitted() {
    const std::lock_guard lock(mutex_);
    return submitted_;
  }
  void wait(int64_t number) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return done_ >= number; });
  }

 private:
  ShimQueue() {
    std::thread([this] { run(); }).detach();
  }
  void run() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return !work_.empty(); });
      const std::function<void()> work = std::move(work_.front());
      work_.pop_front();
      lock.unlock();
      work();
      lock.lock();
      ++done_;
      changed_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;
  int64_t submitted_ = 0, done_ = 0;
};

inline std::atomic<int64_t> shim_launches[2];  // on stream 0, and on any other

// Host memory that cudaHostRegister has seen: begin and end.
inline std::map<int64_t, int64_t>& shim_registered() {
  static auto* registered = new std::map<int64_t, int64_t>;
  return *registered;
}

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) {
  return "shim";
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "refused by the shim";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaFree(void*) {
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* at, int value, size_t size) {
  std::memset(at, value, size);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  ShimQueue::get().wait(ShimQueue::get().submitted());
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 227 << 10;  // of an H100
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  const auto address = reinterpret_cast<int64_t>(host);
  const auto after = shim_registered().upper_bound(address);
  if (after == shim_registered().begin() || std::prev(after)->second <= address) return cudaErrorInvalidValue;
  *device = host;
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** address, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  *found = cudaDriverEntryPointSymbolNotFound;
#define VEP_SHIM(function)                         \
  if (std::string(name) == #function) {            \
    *address = reinterpret_cast<void*>(&function); \
    *found = cudaDriverEntryPointSuccess;          \
  }
  VEP_SHIM(cuDeviceGetAttribute)
  VEP_SHIM(cuGetErrorString)
  VEP_SHIM(cuMemAddressFree)
  VEP_SHIM(cuMemAddressReserve)
  VEP_SHIM(cuMemCreate)
  VEP_SHIM(cuMemGetAllocationGranularity)
  VEP_SHIM(cuMemMap)
  VEP_SHIM(cuMemRelease)
  VEP_SHIM(cuMemSetAccess)
  VEP_SHIM(cuMemUnmap)
#undef VEP_SHIM
  return cudaSuccess;
}

namespace vep {

// As in csrc/cuda/tensors.cuh.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int, int64_t shared_bytes, int64_t stream,
            Arguments... arguments) {
  const auto run = [=] {
    std::vector<int64_t> shared(static_cast<size_t>(shared_bytes / 8 + 1), 0x5A5A5A5A5A5A5A5A);
    for (int block = 0; block < blocks; ++block) {
      blockIdx.x = static_cast<unsigned>(block);
      gridDim.x = static_cast<unsigned>(blocks);
      threadIdx.x = 0;
      dynamic_shared = shared.data();
      kernel(arguments...);
    }
  };
  ++shim_launches[stream != 0];
  if (stream == 0) {
    run();
  } else {
    ShimQueue::get().push(run);
  }
}

}  // namespace vep
