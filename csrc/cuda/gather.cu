#include "gather.cuh"

#include "gather_kernels.cuh"

namespace vep {

cudaError_t load_kernels() {
  cudaFuncAttributes attributes;
  cudaError_t status = cudaFuncGetAttributes(&attributes, gather_kernel);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, await_kernel);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, prefetch_kernel);
  return status;
}

void launch_gather(const RecordLayout& layout, const DemandLists& lists, const Board& board, const Lane& lane,
                   int num_blocks, cudaStream_t stream) {
  gather_kernel<<<num_blocks, kThreads, 0, stream>>>(layout, lists, board, lane);
}

void launch_await(const DeviceList<int32_t>& late, int32_t num_slots, const Board& board, const Lane& lane,
                  cudaStream_t stream) {
  await_kernel<<<1, kThreads, 0, stream>>>(late, num_slots, board, lane);
}

void launch_prefetch(const RecordLayout& layout, const PrefetchLists& lists, const Board& board, const Lane& lane,
                     int num_blocks, int32_t chunk_vectors, cudaStream_t stream) {
  prefetch_kernel<<<num_blocks, kThreads, 0, stream>>>(layout, lists, board, lane, chunk_vectors);
}

}  // namespace vep
