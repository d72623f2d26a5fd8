// Launchers of the staging kernels. None allocates, waits or asks the device anything: all can be captured.
#pragma once

#include <cuda_runtime.h>

#include "../record.h"

namespace vep {

// Loads the kernels' code into the current device. Otherwise CUDA does so at the first launch, which may wait for every
// running kernel and is no business of a capture.
cudaError_t load_kernels();

void launch_gather(const RecordLayout& layout, const DemandLists& lists, const Board& board, const Lane& lane,
                   int num_blocks, cudaStream_t stream);

void launch_await(const DeviceList<int32_t>& late, int32_t num_slots, const Board& board, const Lane& lane,
                  cudaStream_t stream);

void launch_prefetch(const RecordLayout& layout, const PrefetchLists& lists, const Board& board, const Lane& lane,
                     int num_blocks, int32_t chunk_vectors, cudaStream_t stream);

}  // namespace vep
