// Some elements of a product dy^T x, fp32. Compiled once for each ISA: see foreach_isa.h.

#if PK_AVX512
constexpr int lanes = 16;
#elif PK_AVX2
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

// Tokens of a tile: as many as registers hold of one output, beside what they are multiplied with.
constexpr int vectors = 8, tokens = vectors * lanes;
static_assert(tokens <= max_tokens);

using Vector = Floats<lanes>;

// Exchanges, in each pair of blocks of size k x k, what is right above with what is left below.
template <int k, size_t... j>
void exchange(Vector& a, Vector& b, std::index_sequence<j...>) {
  const Vector first = __builtin_shufflevector(a, b, (int(j) & k ? lanes + int(j) - k : int(j))...);
  const Vector second =
      __builtin_shufflevector(a, b, (int(j) & k ? lanes + int(j) : int(j) + k)...);
  a = first, b = second;
}

template <int k>
void transpose_blocks(Vector (&row)[lanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i)
    if (!(i & k)) exchange<k>(row[i], row[i + k], std::make_index_sequence<lanes>{});
  if constexpr (k > 1) transpose_blocks<k / 2>(row);
}

// to [columns, tokens] = from^T, from being [count, columns]; zeros for the tokens that it lacks.
// Written are whole vectors: rows of `to` up to a multiple of `lanes`.
inline void transpose(const float* from, int64_t ld, int64_t count, int64_t columns, float* to) {
  for (int64_t c = 0; c < columns; c += lanes)
    for (int64_t t = 0; t < tokens; t += lanes) {
      Vector row[lanes] = {};
      if (c + lanes <= columns && t + lanes <= count) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) row[i] = *(const Vector*)(from + (t + i) * ld + c);
      } else {
        const int64_t width = columns - c < lanes ? columns - c : lanes;
        for (int64_t i = 0; i < lanes && t + i < count; ++i)
          __builtin_memcpy(&row[i], from + (t + i) * ld + c, size_t(4 * width));
      }
      transpose_blocks<lanes / 2>(row);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) *(Vector*)(to + (c + i) * tokens + t) = row[i];
    }
}

template <int k, size_t... j>
Vector rotated(Vector v, std::index_sequence<j...>) {
  return __builtin_shufflevector(v, v, ((int(j) + k) % lanes)...);
}

// Every lane holds the sum of all.
template <int k = lanes / 2>
float total(Vector v) {
  v += rotated<k>(v, std::make_index_sequence<lanes>{});
  if constexpr (k > 1) return total<k / 2>(v);
  return v[0];
}

// out[i] += <dy, row index[i] - first of x>, dy [tokens] and x [., tokens].
inline void sample(const float* dy, const float* x, const int64_t* index, int64_t first, int64_t n,
                   float* out) {
  constexpr int ahead = 4;
  Vector d[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) d[v] = *(const Vector*)(dy + v * lanes);
  for (int64_t i = 0; i < n; ++i) {
    if (i + ahead < n) {
      const float* next = x + (index[i + ahead] - first) * tokens;
      for (int v = 0; v < tokens; v += 16) __builtin_prefetch(next + v);
    }
    const float* row = x + (index[i] - first) * tokens;
    Vector even = d[0] * *(const Vector*)row, odd = d[1] * *(const Vector*)(row + lanes);
#pragma GCC unroll 8
    for (int v = 2; v < vectors; v += 2) {
      even += d[v] * *(const Vector*)(row + v * lanes);
      odd += d[v + 1] * *(const Vector*)(row + (v + 1) * lanes);
    }
    out[i] += total(even + odd);
  }
}

constexpr Kernels kernels{tokens, transpose, sample};
