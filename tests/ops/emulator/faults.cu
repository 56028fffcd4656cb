// Kernels with the faults that the emulator is there to find, one by one: faults NAME.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace {

enum Fault {
    kNone,
    kNoBarrier,
    kBeyondShared,
    kBeyondGlobal,
    kUnaligned,
    kTwoBarriers,
    kLeftEarly,
    kUnwritten,
    kTooMuch
};
const char* const kNames[] = {"none",         "no barrier", "beyond shared", "beyond global", "unaligned",
                              "two barriers", "left early", "unwritten",     "too much"};

// Every element becomes that of the neighbour, through shared memory.
__global__ void rotate(float* data, Fault fault) {
    extern __shared__ float4 shared[];
    float* values = reinterpret_cast<float*>(shared);
    const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
    if (fault == kLeftEarly && i == 3) return;
    if (fault == kUnaligned) reinterpret_cast<float4*>(data + 1)->x = 0.0f;
    if (fault != kUnwritten || i != 3) values[fault == kBeyondShared ? i + 1 : i] = data[i];
    if (fault == kTwoBarriers && i == 3) {
        __syncthreads();
    } else if (fault != kNoBarrier) {
        __syncthreads();
    }
    data[fault == kBeyondGlobal ? i + 1 : i] = values[(i + 1) % n];
}

}  // namespace

int main(int, char** arguments) {
    int fault = 0;
    while (std::strcmp(kNames[fault], arguments[1]) != 0) ++fault;
    constexpr int kThreads = 8;
    float* data = new float[kThreads];
    for (int i = 0; i < kThreads; ++i) data[i] = static_cast<float>(i);
    rotate<<<1, kThreads, fault == kTooMuch ? 64 << 10 : 4 * kThreads, nullptr>>>(data,
                                                                                  static_cast<Fault>(fault));
    if (cudaGetLastError() != cudaSuccess) return std::puts("not launched"), 0;
    for (int i = 0; i < kThreads; ++i) std::printf("%g ", data[i]);
    delete[] data;
}
