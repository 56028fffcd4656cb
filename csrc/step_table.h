// The coefficients of a reverse step, float32 [steps, kStepColumns], as
// sda_fast.diffusion.Schedule.step_table lays them out. Kernels find their row by an index in device memory.
#pragma once

namespace sda {

enum StepColumn : int {
    kSqrtRecipAlphasCumprod = 0,
    kSqrtRecipm1AlphasCumprod = 1,
    kPosteriorMeanCoef1 = 2,
    kPosteriorMeanCoef2 = 3,
    kLogVarianceLow = 4,   // of betatilde, clipped
    kLogVarianceHigh = 5,  // of beta
    kNoiseScale = 6,       // zero at index 0, where the mean is taken, else one
    kTimestep = 7,
    kStepColumns = 8,
};

}  // namespace sda
