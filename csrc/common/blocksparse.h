// Products with a block-sparse matrix, fp32. Compiled once for each ISA: see foreach_isa.h.

#if PK_AVX512
constexpr int lanes = 16, tile_rows = 12;
#elif PK_AVX2
constexpr int lanes = 8, tile_rows = 6;
#else
constexpr int lanes = 4, tile_rows = 6;
#endif

// Columns that one strip of a packed matrix holds: two vectors, or one where blocks are narrower.
inline int64_t strip_width(int64_t block_size) {
  return block_size >= 2 * lanes ? 2 * lanes : lanes;
}

// sum [rows, strip] += a b over some runs of b. Never inlined, so that all registers are for these
// terms.
template <int rows, int vectors>
__attribute__((noinline)) void add_runs(const float* a, int64_t lda, const float* panel,
                                        const Run* run, const Run* end,
                                        Floats<lanes> (&sum)[rows][vectors]) {
  Floats<lanes> some[rows][vectors] = {};
  for (; run != end; ++run) {
    const float* column = a + run->begin;
    for (int64_t k = 0; k < run->length; ++k, ++column, panel += vectors * lanes) {
      Floats<lanes> row[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) row[v] = *(const Floats<lanes>*)(panel + v * lanes);
#pragma GCC unroll 24
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) some[r][v] += column[r * lda] * row[v];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sum[r][v] += some[r][v];
}

// c [rows, strip] = bias + a b, b a packed strip. The terms are added up in parts: one running sum of
// thousands would round far more than plain PyTorch's.
template <int rows, int vectors>
void tile(const float* a, int64_t lda, const Strip& b, const float* bias, float* c, int64_t ldc) {
  Floats<lanes> sum[rows][vectors];
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v)
      sum[r][v] = bias ? *(const Floats<lanes>*)(bias + v * lanes) : Floats<lanes>{};
  const float* panel = b.panel;
  for (const Run *run = b.begin, *end = run; run != b.end; run = end) {
    int64_t terms = 0;
    while (end != b.end && terms < max_run) terms += (end++)->length;
    add_runs(a, lda, panel, run, end, sum);
    panel += terms * vectors * lanes;
  }
  for (int r = 0; r < rows; ++r) std::memcpy(c + r * ldc, sum[r], 4 * b.columns);
}

template <int rows, int vectors>
void rows_times_strip(const float* a, int64_t lda, int64_t count, const Strip& b, const float* bias,
                      float* c, int64_t ldc) {
  for (; count >= rows; count -= rows, a += rows * lda, c += rows * ldc)
    tile<rows, vectors>(a, lda, b, bias, c, ldc);
  if constexpr (rows > 1) {
    if (count) rows_times_strip<rows / 2, vectors>(a, lda, count, b, bias, c, ldc);
  }
}

// c [count, strip] = bias + a [count, K] b.
inline void times_strip(const float* a, int64_t lda, int64_t count, const Strip& b, int64_t width,
                        const float* bias, float* c, int64_t ldc) {
  if (width == 2 * lanes)
    rows_times_strip<tile_rows, 2>(a, lda, count, b, bias, c, ldc);
  else
    rows_times_strip<2 * tile_rows, 1>(a, lda, count, b, bias, c, ldc);
}

// out [rows, vectors * n] += dy^T x, over `tokens` of both.
template <int rows, int vectors, int n>
void outer_tile(const float* dy, int64_t ldy, const float* x, int64_t ldx, int64_t tokens,
                float* out, int64_t ldo) {
  Floats<n> sum[rows][vectors] = {};
  for (int64_t t = 0; t < tokens; ++t, dy += ldy, x += ldx) {
    Floats<n> row[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) row[v] = *(const Floats<n>*)(x + v * n);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[r][v] += dy[r] * row[v];
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) *(Floats<n>*)(out + r * ldo + v * n) += sum[r][v];
}

template <int rows, int vectors, int n>
void outer_rows(const float* dy, int64_t ldy, const float* x, int64_t ldx, int64_t tokens,
                int64_t count, float* out, int64_t ldo) {
  for (; count >= rows; count -= rows, dy += rows, out += rows * ldo)
    outer_tile<rows, vectors, n>(dy, ldy, x, ldx, tokens, out, ldo);
  if constexpr (rows > 1) {
    if (count) outer_rows<rows / 2, vectors, n>(dy, ldy, x, ldx, tokens, count, out, ldo);
  }
}

template <int n>
void outer_columns(const float* dy, int64_t ldy, const float* x, int64_t ldx, int64_t tokens,
                   int64_t rows, int64_t columns, float* out, int64_t ldo) {
  // As many rows as leave registers for x, as in `tile`.
  constexpr int height = PK_AVX512 ? 8 : 4;
  for (; columns >= 2 * n; columns -= 2 * n, x += 2 * n, out += 2 * n)
    outer_rows<height, 2, n>(dy, ldy, x, ldx, tokens, rows, out, ldo);
  if (columns >= n) {
    outer_rows<height, 1, n>(dy, ldy, x, ldx, tokens, rows, out, ldo);
    columns -= n, x += n, out += n;
  }
  if constexpr (n > 1) {
    if (columns) outer_columns<n / 2>(dy, ldy, x, ldx, tokens, rows, columns, out, ldo);
  }
}

// out [rows, columns] += dy^T x for the first `rows` of dy [tokens, .] and `columns` of x.
inline void outer_product(const float* dy, int64_t ldy, const float* x, int64_t ldx, int64_t tokens,
                          int64_t rows, int64_t columns, float* out, int64_t ldo) {
  outer_columns<lanes>(dy, ldy, x, ldx, tokens, rows, columns, out, ldo);
}

constexpr Kernels kernels{strip_width, times_strip, outer_product};
