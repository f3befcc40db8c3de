// Sparse rows times a dense matrix, fp32. Compiled once for each ISA: see foreach_isa.h.

#if PK_AVX512
constexpr int lanes = 16;
#elif PK_AVX2
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

constexpr int vectors = 4, panel_width = vectors * lanes;

using Vector = Floats<lanes>;

// Sums of one row of the result, in registers.
struct Sums {
  Vector sum[vectors] = {};

  __attribute__((always_inline)) void add(const float* panel, int32_t column, float value) {
    const float* row = panel + int64_t(column) * panel_width;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[v] += value * *(const Vector*)(row + v * lanes);
  }

  void add(const Sums& other) {
    for (int v = 0; v < vectors; ++v) sum[v] += other.sum[v];
  }

};

// sums[r - begin] += value[e] panel[column[e]] over those elements e of row r, from next[r] on, whose
// column is less than `limit`; next[r] goes past them. Columns ascend, and the panel's rows before
// `limit` are in the cache. Two rows at a time: one alone would wait for its additions.
inline void sparse_rows(int64_t* next, const int64_t* end_of, const int32_t* column,
                        const float* value, int64_t begin, int64_t end, int32_t limit,
                        const float* panel, float* out) {
  Sums* sums = reinterpret_cast<Sums*>(out);
  for (int64_t r = begin; r < end; r += 2, sums += 2) {
    const bool pair = r + 1 < end;
    int64_t a = next[r], b = pair ? next[r + 1] : 0;
    const int64_t a_end = end_of[r], b_end = pair ? end_of[r + 1] : 0;
    // From zero, and added at the end: fewer roundings than one sum over all blocks.
    Sums first, second;
    for (; a < a_end && b < b_end && column[a] < limit && column[b] < limit; ++a, ++b) {
      first.add(panel, column[a], value[a]);
      second.add(panel, column[b], value[b]);
    }
    for (; a < a_end && column[a] < limit; ++a) first.add(panel, column[a], value[a]);
    for (; b < b_end && column[b] < limit; ++b) second.add(panel, column[b], value[b]);
    sums[0].add(first), next[r] = a;
    if (pair) sums[1].add(second), next[r + 1] = b;
  }
}

constexpr Kernels kernels{panel_width, sparse_rows};
