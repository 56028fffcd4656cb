// How the CUDA version of guidance cuts an image into tiles, and what it needs for them. Plain C++: whether
// an image fits is asked before anything is launched, and tested without a device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../guidance.h"

namespace sda::cuda {

constexpr int kTileRows = 44;  // of an image, about; 11 groups for D = 4, of which 65 make 256 rows
constexpr int kMinGroups = 3;  // then a row of P meets two tiles at most
// Of the 48 KiB that a block may take unasked, and of the 99 KiB that every device from sm_80 on has for one,
// without the kernels' static 1 KiB.
constexpr int64_t kFreeShared = 47 << 10;
constexpr int64_t kMaxShared = 98 << 10;
constexpr int64_t kAlignment = 256;

struct Plan {
    int size, low, factor, lanes;
    int planes;         // of an image: channels / lanes
    int width, narrow;  // columns of a row and of a low row: n * lanes, m * lanes
    int groups, tiles;  // groups in a tile, tiles in a plane
    int quads;          // bytes of the mask for each group and column
    int pitch;          // from one phase to the next in shared memory
    float* sums;        // [images, planes, tiles, groups + 3, narrow]
    uint8_t* mask;      // [images, planes, m + 2, quads, width]
    float* parts;       // of squares: [images, planes, tiles]
    unsigned* arrived;  // [images]: how many parts are written
};

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

inline int64_t taps_shared(const Plan& p) { return 16 * int64_t{p.groups} * p.factor; }

inline int64_t reduce_shared(const Plan& p) {
    return taps_shared(p) + 4 * (4 * int64_t{p.size} + int64_t{p.groups + 3} * p.factor * p.pitch);
}

inline int64_t spread_shared(const Plan& p) { return taps_shared(p) + 8 * int64_t{p.groups + 9} * p.narrow; }

inline int64_t larger_shared(const Plan& p) { return std::max(reduce_shared(p), spread_shared(p)); }

// Without the workspace. The tiles depend on the sizes alone, so that an image's sums do not depend on its
// batch.
inline Plan plan_for(const GuidanceTensors& t, int64_t lanes) {
    Plan p{};
    p.size = static_cast<int>(t.size);
    p.low = static_cast<int>(t.low);
    p.factor = p.size / p.low;
    p.lanes = static_cast<int>(lanes);
    p.planes = static_cast<int>(t.channels / lanes);
    p.width = p.size * p.lanes;
    p.narrow = p.low * p.lanes;
    p.quads = (p.factor + 3) / 4;
    p.pitch = (p.low + 3) * p.lanes;
    const int tiles = std::max(1, (p.low + 1) * p.factor / kTileRows);
    p.groups = std::max(kMinGroups, (p.low + tiles) / tiles);
    while (p.groups > kMinGroups && larger_shared(p) > kFreeShared) --p.groups;
    p.tiles = (p.low + p.groups) / p.groups;
    return p;
}

inline Plan plan_for(const GuidanceTensors& t) {
    const Plan p = plan_for(t, t.interleaved ? t.channels : 1);
    return larger_shared(p) <= kMaxShared ? p : plan_for(t, 1);
}

// Whether a block's shared memory holds a tile, whose rows are whole: for D = 1 up to n = 1044, for D = 4 up
// to n = 2496. Only channels, size, low and interleaved are read.
inline bool guidance_fits(const GuidanceTensors& t) {
    return valid(t) && t.size * t.channels <= INT32_MAX / 16 && larger_shared(plan_for(t)) <= kMaxShared;
}

// Lays the workspace out at `base` (null to count only); returns its bytes.
inline int64_t carve(const GuidanceTensors& t, Plan& p, char* base) {
    int64_t used = 0;
    const int64_t planes = t.images * p.planes;
    const auto take = [&](int64_t bytes) {
        char* start = base == nullptr ? nullptr : base + used;
        used += round_up(bytes, kAlignment);
        return start;
    };
    p.sums = reinterpret_cast<float*>(take(4 * planes * p.tiles * (p.groups + 3) * p.narrow));
    p.mask = reinterpret_cast<uint8_t*>(take(planes * (p.low + 2) * p.quads * p.width));
    p.parts = reinterpret_cast<float*>(take(4 * planes * p.tiles));
    p.arrived = reinterpret_cast<unsigned*>(take(4 * t.images));
    return used;
}

}  // namespace sda::cuda
