// The alignment loss on CUDA: loss and student gradient in one pass, the teacher gradient by gather, the scale kernel.
//
// A team of warps takes one student row at a time and keeps the row and the resized teacher's row in registers between
// the sums and the gradient. Blocks walk over tiles of consecutive tokens, whose taps are mostly the same teacher rows.
// Every sum has one order, so results are the same in every run.
#include <cuda_runtime.h>

#include "alignment_loss.cuh"
#include "alignment_loss_cuda.h"
#include "packs.cuh"

namespace unigendet {
namespace {

constexpr int kVector = 8;       // numbers that a thread loads at a time, in 16 or 32 bytes
constexpr int kMaxChunks = 4;    // such vectors of one row that a thread keeps in registers
constexpr int kThreads = 256;
constexpr int kRowThreads = 128;  // of the blocks that compute student rows
constexpr int kMaxTeam = kRowThreads / 32;  // warps that share a row
constexpr unsigned kAllLanes = 0xffffffffu;

// The four taps of one student token. A tap of weight 0 is not read: it points to null.
template <class T>
struct Taps {
  const T* rows[4];
  float weights[4];

  __device__ __forceinline__ Taps(const Rows& teacher, const Image& image, Tap y, Tap x) {
    const T* base = static_cast<const T*>(teacher.data) + image.teacher_row * teacher.stride;
    const int64_t line = image.teacher_w * teacher.stride;
    const T* upper = base + y.lower * line;
    const T* lower = base + y.upper * line;
    rows[0] = upper + x.lower * teacher.stride;
    rows[1] = upper + x.upper * teacher.stride;
    rows[2] = lower + x.lower * teacher.stride;
    rows[3] = lower + x.upper * teacher.stride;
    weights[0] = (1.0f - y.fraction) * (1.0f - x.fraction);
    weights[1] = (1.0f - y.fraction) * x.fraction;
    weights[2] = y.fraction * (1.0f - x.fraction);
    weights[3] = y.fraction * x.fraction;
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = weights[i] == 0.0f ? nullptr : rows[i];
  }

  // n columns of the resized row from column d on.
  template <int n>
  __device__ __forceinline__ void resize(int d, float (&r)[n]) const {
    Pack<T, n> packs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (rows[i] != nullptr) packs[i] = load<T, n>(rows[i] + d);
    }
#pragma unroll
    for (int j = 0; j < n; ++j) r[j] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (rows[i] != nullptr) {
        stay_packed(packs[i]);
#pragma unroll
        for (int j = 0; j < n; ++j) r[j] += weights[i] * to_float(packs[i].values[j]);
      }
    }
  }
};

struct Sums {
  float ss = 0.0f, rr = 0.0f, sr = 0.0f;

  __device__ __forceinline__ void add(float s, float r) {
    ss += s * s;
    rr += r * r;
    sr += s * r;
  }
  __device__ __forceinline__ void add(const Sums& other) {
    ss += other.ss;
    rr += other.rr;
    sr += other.sr;
  }
};

// The sums of all threads of a team, in one order, in every thread. A team of more than one warp is a block.
template <int team>
__device__ __forceinline__ Sums reduce_team(Sums sums) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    Sums other;
    other.ss = __shfl_xor_sync(kAllLanes, sums.ss, lane);
    other.rr = __shfl_xor_sync(kAllLanes, sums.rr, lane);
    other.sr = __shfl_xor_sync(kAllLanes, sums.sr, lane);
    sums.add(other);
  }
  if constexpr (team > 1) {
    __shared__ float shared[3][team];
    const int warp = threadIdx.x / 32;
    __syncthreads();  // the values of the row before have been read
    if (threadIdx.x % 32 == 0) {
      shared[0][warp] = sums.ss;
      shared[1][warp] = sums.rr;
      shared[2][warp] = sums.sr;
    }
    __syncthreads();
    sums = Sums();
#pragma unroll
    for (int i = 0; i < team; ++i) {
      sums.ss += shared[0][i];
      sums.rr += shared[1][i];
      sums.sr += shared[2][i];
    }
  }
  return sums;
}

template <class S, int n>
__device__ __forceinline__ void store_gradient(S* out, float across, const float (&r)[n], float own,
                                               const Pack<S, n>& s) {
  Pack<S, n> pack;
#pragma unroll
  for (int j = 0; j < n; ++j) from_float(across * r[j] + own * to_float(s.values[j]), &pack.values[j]);
  store_once<S, n>(out, pack);
}

// One student row by `team` warps; `thread` counts within them. With chunks > 0 the row stays in registers; otherwise it
// may have any length, and a second pass reads it again.
template <class S, class T, int n, int team, int chunks>
__device__ __forceinline__ Row student_row(const AlignmentLossParams& p, const S* s, const Taps<T>& taps, S* ds,
                                           float u, float factor, int thread) {
  constexpr int kStep = 32 * team * n;
  constexpr int kKept = chunks > 0 ? chunks : 1;
  const int first = thread * n;
  Pack<S, n> kept_s[kKept];
  float kept_r[kKept][n];
  Sums sums;
  if constexpr (chunks > 0) {
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      if (first + i * kStep < p.columns) kept_s[i] = load_once<S, n>(s + first + i * kStep);
    }
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      if (first + i * kStep < p.columns) {
        taps.template resize<n>(first + i * kStep, kept_r[i]);
#pragma unroll
        for (int j = 0; j < n; ++j) sums.add(to_float(kept_s[i].values[j]), kept_r[i][j]);
        stay_packed(kept_s[i]);
      }
    }
  } else {
    for (int d = first; d < p.columns; d += kStep) {
      kept_s[0] = load<S, n>(s + d);
      taps.template resize<n>(d, kept_r[0]);
#pragma unroll
      for (int j = 0; j < n; ++j) sums.add(to_float(kept_s[0].values[j]), kept_r[0][j]);
    }
  }
  sums = reduce_team<team>(sums);
  const Row row = finish_row(sums.ss, sums.rr, sums.sr, u);
  if (ds == nullptr) return row;
  const float across = factor * row.across, own = factor * row.own_student;
  if constexpr (chunks > 0) {
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      const int d = first + i * kStep;
      if (d < p.columns) store_gradient<S, n>(ds + d, across, kept_r[i], own, kept_s[i]);
    }
  } else {
    for (int d = first; d < p.columns; d += kStep) {
      kept_s[0] = load<S, n>(s + d);
      taps.template resize<n>(d, kept_r[0]);
      store_gradient<S, n>(ds + d, across, kept_r[0], own, kept_s[0]);
    }
  }
  return row;
}

// Distances, coefficients and student gradients of all rows. Blocks of `team` warps, or of independent single warps.
template <class S, class T, int n, int team, int chunks>
__global__ void __launch_bounds__(kRowThreads, sizeof(S) + sizeof(T) > 4 ? 3 : 4)  // so that no register spills
    student_rows(const AlignmentLossParams p) {
  static_assert(team == 1 || team == kMaxTeam, "a team is a warp or a block");
  constexpr int kTeams = kMaxTeam / team;
  const int thread = threadIdx.x % (32 * team);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *reinterpret_cast<unsigned*>(p.image_sums + p.num_images) = 0;  // the counter of sum_images
  }
  const float factor = p.unit_dstudent ? 1.0f : kappa_of(p);
  for (int tile_index = blockIdx.x; tile_index < p.num_tiles; tile_index += gridDim.x) {
    const Tile tile = p.tiles[tile_index];
    const Image image = p.images[tile.image];
    const int end = tile.token + min(kTileTokens, image.h * image.w - tile.token);
    for (int token = tile.token + threadIdx.x / (32 * team); token < end; token += kTeams) {
      const Tap y = tap(token / image.w, image.h, image.teacher_h), x = tap(token % image.w, image.w, image.teacher_w);
      const Taps<T> taps(p.teacher, image, y, x);
      const int64_t row = image.student_row + token;
      const S* s = static_cast<const S*>(p.student.data) + row * p.student.stride;
      S* ds = p.dstudent == nullptr ? nullptr : static_cast<S*>(p.dstudent) + row * p.columns;
      const float u = p.token_weights == nullptr ? 1.0f : p.token_weights[row];
      const Row result = student_row<S, T, n, team, chunks>(p, s, taps, ds, u, factor, thread);
      if (thread == 0) {
        p.distances[row] = result.distance;
        if (p.coefficients != nullptr) {
          p.coefficients[2 * row] = result.across;
          p.coefficients[2 * row + 1] = result.own_teacher;
        }
      }
    }
  }
}

// Gradients of the teacher's rows, a warp for each: the sum over the student tokens that read it, in their order.
template <class S, class T, int n>
__global__ void __launch_bounds__(kThreads, 2) teacher_rows(const AlignmentLossParams p) {
  const float factor = p.unit_dteacher ? 1.0f : kappa_of(p);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.teacher_rows) return;
  int low = 0, high = p.num_images - 1;  // the last image that begins at `row` or before
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (p.images[middle].teacher_row <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Image image = p.images[low];
  const int teacher_y = static_cast<int>(row - image.teacher_row) / image.teacher_w;
  const int teacher_x = static_cast<int>(row - image.teacher_row) % image.teacher_w;
  const Range ys = outputs_reading(teacher_y, image.h, image.teacher_h);
  const Range xs = outputs_reading(teacher_x, image.w, image.teacher_w);
  for (int d = threadIdx.x % 32 * n; d < p.columns; d += 32 * n) {
    float sum[n] = {};
    for (int y = ys.begin; y < ys.end; ++y) {
      const Tap y_tap = tap(y, image.h, image.teacher_h);
      const float y_weight = weight_of(y_tap, teacher_y);
      if (y_weight == 0.0f) continue;
      for (int x = xs.begin; x < xs.end; ++x) {
        const Tap x_tap = tap(x, image.w, image.teacher_w);
        const float weight = y_weight * weight_of(x_tap, teacher_x);
        if (weight == 0.0f) continue;
        const int64_t token = image.student_row + static_cast<int64_t>(y) * image.w + x;
        const float across = weight * p.coefficients[2 * token], own = weight * p.coefficients[2 * token + 1];
        const Pack<S, n> s = load<S, n>(static_cast<const S*>(p.student.data) + token * p.student.stride + d);
        float r[n];
        Taps<T>(p.teacher, image, y_tap, x_tap).template resize<n>(d, r);
#pragma unroll
        for (int j = 0; j < n; ++j) sum[j] += across * to_float(s.values[j]) + own * r[j];
      }
    }
    Pack<T, n> out;
#pragma unroll
    for (int j = 0; j < n; ++j) from_float(factor * sum[j], &out.values[j]);
    store_once<T, n>(static_cast<T*>(p.dteacher) + row * p.columns + d, out);
  }
}

// The sum of one number of each thread of a block, in one order, in thread 0.
__device__ double reduce_block(double value, double* shared) {
  __syncthreads();
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) shared[threadIdx.x] += shared[threadIdx.x + width];
    __syncthreads();
  }
  return shared[0];
}

// A block for each image: its mean; the block that comes last adds up the images, in their order.
__global__ void __launch_bounds__(kThreads) sum_images(const AlignmentLossParams p) {
  __shared__ double shared[kThreads];
  __shared__ bool is_last;
  const Image image = p.images[blockIdx.x];
  const int tokens = image.h * image.w;
  double distance = 0.0, count = 0.0;
  for (int64_t token = threadIdx.x; token < tokens; token += kThreads) {
    distance += static_cast<double>(p.distances[image.student_row + token]);
    count += p.token_weights == nullptr ? 1.0 : static_cast<double>(p.token_weights[image.student_row + token]);
  }
  distance = reduce_block(distance, shared);
  count = reduce_block(count, shared);
  if (threadIdx.x == 0) {
    p.means[blockIdx.x] = static_cast<float>(distance / count);
    p.image_sums[blockIdx.x] = distance;
    __threadfence();
    is_last = atomicAdd(reinterpret_cast<unsigned*>(p.image_sums + p.num_images), 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  double total = 0.0;
  for (int i = threadIdx.x; i < p.num_images; i += kThreads) total += __ldcg(p.image_sums + i);
  total = reduce_block(total, shared);
  if (threadIdx.x == 0) *p.loss = kappa_of(p) * static_cast<float>(total);
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads) scale_all(const ScaleParams p) {
  const float factor = *p.factor;
  if (factor == 1.0f && p.out == p.gradient) return;
  const T* gradient = static_cast<const T*>(p.gradient);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * n;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * n; i < p.numel; i += step) {
    Pack<T, n> pack = load_once<T, n>(gradient + i);
#pragma unroll
    for (int j = 0; j < n; ++j) from_float(factor * to_float(pack.values[j]), &pack.values[j]);
    store_once<T, n>(static_cast<T*>(p.out) + i, pack);
  }
}

// Blocks that run at the same time on the current device; null in `error` unless asking fails.
template <class Kernel>
int resident_blocks(Kernel kernel, int threads, cudaError_t* error) {
  int device = 0, multiprocessors = 0, per_multiprocessor = 0;
  *error = cudaGetDevice(&device);
  if (*error == cudaSuccess) *error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (*error == cudaSuccess) {
    *error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, 0);
  }
  return multiprocessors * per_multiprocessor;
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

bool is_aligned(const void* pointer, int64_t row_elements, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_elements * element_size % 16 == 0;
}

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

template <class S, class T, int n, int team, int chunks>
cudaError_t launch_student(const AlignmentLossParams& p) {
  cudaError_t error = cudaSuccess;
  const int resident = resident_blocks(student_rows<S, T, n, team, chunks>, kRowThreads, &error);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(smaller(resident, p.num_tiles));
  student_rows<S, T, n, team, chunks><<<blocks, kRowThreads, 0, stream_of(p.stream)>>>(p);
  return cudaGetLastError();
}

template <class S, class T, int n>
cudaError_t launch_teacher(const AlignmentLossParams& p) {
  constexpr int rows = kThreads / 32;
  const unsigned blocks = static_cast<unsigned>((static_cast<int64_t>(p.teacher_rows) + rows - 1) / rows);
  teacher_rows<S, T, n><<<blocks, kThreads, 0, stream_of(p.stream)>>>(p);
  return cudaGetLastError();
}

// With 16-byte accesses where every row of every matrix allows them.
template <class S, class T>
cudaError_t launch(const AlignmentLossParams& p) {
  const bool vectors = p.columns % kVector == 0 && is_aligned(p.student.data, p.student.stride, sizeof(S)) &&
                       is_aligned(p.teacher.data, p.teacher.stride, sizeof(T)) &&
                       is_aligned(p.dstudent, p.columns, sizeof(S)) && is_aligned(p.dteacher, p.columns, sizeof(T));
  constexpr int one = 32 * kVector;  // columns that a warp loads at a time
  cudaError_t error;
  if (!vectors) {
    error = launch_student<S, T, 1, 1, 0>(p);
  } else if (p.columns <= one) {
    error = launch_student<S, T, kVector, 1, 1>(p);
  } else if (p.columns <= kMaxChunks * one) {
    error = launch_student<S, T, kVector, 1, kMaxChunks>(p);
  } else if (p.columns <= kMaxTeam * kMaxChunks * one) {
    error = launch_student<S, T, kVector, kMaxTeam, kMaxChunks>(p);
  } else {
    error = launch_student<S, T, kVector, 1, 0>(p);
  }
  if (error == cudaSuccess && p.dteacher != nullptr) {
    error = vectors ? launch_teacher<S, T, kVector>(p) : launch_teacher<S, T, 1>(p);
  }
  return error;
}

template <class S>
cudaError_t launch(const AlignmentLossParams& p) {
  switch (p.teacher.dtype) {
    case Dtype::float32: return launch<S, float>(p);
    case Dtype::bfloat16: return launch<S, Bfloat16>(p);
    case Dtype::float16: return launch<S, Float16>(p);
  }
  return cudaErrorInvalidValue;
}

template <class T, int n>
cudaError_t launch_scale(const ScaleParams& p) {
  cudaError_t error = cudaSuccess;
  const int resident = resident_blocks(scale_all<T, n>, kThreads, &error);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(smaller(resident, (p.numel + kThreads * n - 1) / (kThreads * n)));
  scale_all<T, n><<<blocks, kThreads, 0, stream_of(p.stream)>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_scale(const ScaleParams& p) {
  if (p.numel == 0) return cudaSuccess;
  const bool vectors = p.numel % kVector == 0 && is_aligned(p.gradient, 0, 0) && is_aligned(p.out, 0, 0);
  return vectors ? launch_scale<T, kVector>(p) : launch_scale<T, 1>(p);
}

// The message of an error that is reported, which the next launch must not find again; null if there is none.
const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  (void)cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace

namespace cuda {

const char* alignment_loss(const AlignmentLossParams& p) {
  cudaError_t error = cudaErrorInvalidValue;
  switch (p.student.dtype) {
    case Dtype::float32: error = launch<float>(p); break;
    case Dtype::bfloat16: error = launch<Bfloat16>(p); break;
    case Dtype::float16: error = launch<Float16>(p); break;
  }
  if (error != cudaSuccess) return text_of(error);
  sum_images<<<static_cast<unsigned>(p.num_images), kThreads, 0, stream_of(p.stream)>>>(p);
  return text_of(cudaGetLastError());
}

const char* scale(const ScaleParams& p) {
  switch (p.dtype) {
    case Dtype::float32: return text_of(launch_scale<float>(p));
    case Dtype::bfloat16: return text_of(launch_scale<Bfloat16>(p));
    case Dtype::float16: return text_of(launch_scale<Float16>(p));
  }
  return text_of(cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace unigendet
