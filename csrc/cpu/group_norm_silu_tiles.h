// The loops of group_norm_silu on the CPU. They see every layout as tiles of rows by lanes, lanes side by
// side in memory, with one coefficient per lane. In channels_last a row is one or several pixels and a lane a
// channel of one of them; in contiguous images a lane is any element of one channel, or of one group where
// only moments are taken.
#pragma once

#include <cstdint>

namespace sda::cpu {

constexpr int64_t kLanes = 256;  // of a tile at most
constexpr int64_t kRows = 32;    // of a tile at most: it is read twice and stays in the first cache

struct Tile {
    int64_t rows;
    int64_t lanes;
};

struct Source {
    const void* data;
    int64_t pitch;  // elements from row to row
};

struct Target {
    void* data;
    int64_t pitch;
};

// The letters of group_norm_silu.h, one value per lane.
struct Coefficients {
    const float* mean;             // less x_bias
    const float* slope;            // A
    const float* offset;           // B
    const float* pull = nullptr;   // K
    const float* drift = nullptr;  // M
};

// The mean, as base + offset, and the sum of squared deviations of every lane, merged into those of the
// `done` rows before. The base is the lane's first element: what is added up is small where the numbers are
// not.
struct LaneMoments {
    float* base;
    float* offset;
    float* squares;
};

void merge_moments(int dtype, const Source& x, const Tile& tile, int64_t done, const LaneMoments& moments);

// y of x.
void apply_norm(int dtype, bool silu, const Source& x, const Target& y, const Tile& tile,
                const Coefficients& c);

// Adds the sums of du and of du (x - mean) of every lane to those of the rows before. Writes du [rows,
// lanes], unless null.
void add_sums(int dtype, bool silu, const Source& dy, const Source& x, const Tile& tile,
              const Coefficients& c, float* sum, float* moment, float* du);

// dx of dy and x, and of du [rows, lanes] if not null, plus residual, if that has data.
void apply_gradient(int dtype, bool silu, const Source& dy, const Source& x, const float* du,
                    const Source& residual, const Target& dx, const Tile& tile, const Coefficients& c);

}  // namespace sda::cpu
