// Sums |p g|^2, |p h|^2, <p g, p h>, |g|^2 in fp64. Compiled once for each ISA: see foreach_isa.h.

#if PK_AVX512
constexpr int lanes = 8;
#elif PK_AVX2
constexpr int lanes = 4;
#else
constexpr int lanes = 2;
#endif

// Anywhere in memory.
typedef double Doubles __attribute__((vector_size(8 * lanes), aligned(8), may_alias));

inline Doubles load(const double* from) { return *(const Doubles*)from; }

// `keep` gives zeros, whatever was there, where p is 0. The compiler's own conversions between
// vectors of unequal width would take a detour through memory.
#if PK_AVX512
// Zero-masked: of the plain one GCC warns that it reads what is not initialised.
inline Doubles convert(__m256 values) { return (Doubles)_mm512_maskz_cvtps_pd(0xff, values); }

inline Doubles load(const float* from) { return convert(_mm256_loadu_ps(from)); }

inline Doubles load(const Bf16* from) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return convert(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}

inline Doubles load(const Fp16* from) {
  return convert(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)));
}

inline Doubles keep(Doubles values, const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
  return (Doubles)_mm512_maskz_mov_pd(__mmask8(_mm_test_epi8_mask(bytes, bytes)), (__m512d)values);
}
#elif PK_AVX2
inline Doubles convert(__m128 values) { return (Doubles)_mm256_cvtps_pd(values); }

inline Doubles load(const float* from) { return convert(_mm_loadu_ps(from)); }

inline Doubles load(const Bf16* from) {
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from));
  return convert(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
}

inline Doubles load(const Fp16* from) {
  return convert(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from)));
}

inline Doubles keep(Doubles values, const uint8_t* p) {
  int four;
  __builtin_memcpy(&four, p, sizeof four);
  const __m128i outside = _mm_cmpeq_epi8(_mm_cvtsi32_si128(four), _mm_setzero_si128());
  const __m256i wide = _mm256_cvtepi8_epi64(outside);
  return (Doubles)_mm256_andnot_pd(_mm256_castsi256_pd(wide), (__m256d)values);
}
#else
inline Doubles load(const float* from) { return Doubles{from[0], from[1]}; }

inline double convert(Bf16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }

inline double convert(Fp16 value) { return half_to_float(value); }

template <class T>
Doubles load(const T* from) {
  return Doubles{convert(from[0]), convert(from[1])};
}

inline Doubles keep(Doubles values, const uint8_t* p) {
  return Doubles{p[0] ? values[0] : 0.0, p[1] ? values[1] : 0.0};
}
#endif

inline double widen(double value) { return value; }
inline double widen(float value) { return value; }

// By the vector version: they must agree, and only the ends of runs come here.
template <class T>
double widen(T value) {
  T padded[lanes] = {value};
  return load(padded)[0];
}

// Two sets of sums, so that each waits for its additions half the time.
struct Sums {
  Doubles vectors[2][4] = {};
  double rest[4] = {};

  template <bool has_h, bool masked>
  static void add(Doubles (&sum)[4], Doubles g, Doubles h, const uint8_t* p) {
    sum[3] += g * g;
    if constexpr (has_h) {
      if constexpr (masked) g = keep(g, p), h = keep(h, p);
      sum[0] += g * g, sum[1] += h * h, sum[2] += g * h;
    }
  }

  template <bool has_h, bool masked, class T>
  void run(const T* g, const T* h, const uint8_t* p, int64_t n) {
    auto vector = [&](int set, int64_t i) __attribute__((always_inline)) {
      Doubles second{};
      if constexpr (has_h) second = load(h + i);
      add<has_h, masked>(vectors[set], load(g + i), second, masked ? p + i : p);
    };
    int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) vector(0, i), vector(1, i + lanes);
    if (i + lanes <= n) vector(0, i), i += lanes;
    strided<has_h, masked>(g + i, 1, h + i, 1, masked ? p + i : p, 1, n - i);
  }

  template <bool has_h, bool masked, class T>
  void strided(const T* g, int64_t g_step, const T* h, int64_t h_step, const uint8_t* p,
               int64_t p_step, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const double first = widen(g[i * g_step]);
      rest[3] += first * first;
      if constexpr (has_h) {
        if (masked && !p[i * p_step]) continue;
        const double second = widen(h[i * h_step]);
        rest[0] += first * first, rest[1] += second * second, rest[2] += first * second;
      }
    }
  }

  void add_to(double* out) const {
    for (int k = 0; k < 4; ++k) {
      double total = rest[k];
      for (int lane = 0; lane < lanes; ++lane) total += vectors[0][k][lane] + vectors[1][k][lane];
      out[k] += total;
    }
  }
};

template <bool has_h, bool masked, class T>
void add_row(Sums& sums, const T* g, const T* h, const uint8_t* p, const int64_t* step, int64_t n) {
  const bool adjacent = step[0] == 1 && (!has_h || step[1] == 1) && (!masked || step[2] == 1);
  if (adjacent)
    sums.run<has_h, masked>(g, h, p, n);
  else
    sums.strided<has_h, masked>(g, step[0], h, step[1], p, step[2], n);
}

// Rows with gaps between them: the processor's own prefetching starts anew with each.
template <class T>
void prefetch_row(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

// The sums over a plane, added to out.
template <class T>
void add_plane(const Plane& plane, double* out) {
  // A mask that does not change along a row says whether the whole row is inside.
  const bool p_varies = plane.p && plane.step[2], q_varies = plane.q && plane.step[3];
  const int64_t steps[3] = {plane.step[0], plane.step[1], plane.step[q_varies ? 3 : 2]};
  // Enough bytes that a row is in the cache when its turn comes.
  const int64_t ahead = 1 + 4096 / (1 + plane.length * int64_t(sizeof(T)));
  const int64_t width = plane.length + plane.outside;
  const bool g_gaps = plane.step[0] == 1 && plane.row_step[0] > width;
  const bool h_gaps = plane.step[1] == 1 && plane.row_step[1] > plane.length;
  Sums sums;
  for (int64_t row = 0; row < plane.rows; ++row) {
    const T* g = (const T*)plane.g + row * plane.row_step[0];
    const T* h = (const T*)plane.h + row * plane.row_step[1];
    const uint8_t* p = plane.p + row * plane.row_step[2];
    const uint8_t* q = plane.q + row * plane.row_step[3];
    const bool outside = !plane.h || (plane.p && !p_varies && !*p) || (plane.q && !q_varies && !*q);
    if (row + ahead < plane.rows) {
      if (g_gaps) prefetch_row(g + ahead * plane.row_step[0], width);
      if (h_gaps && !outside) prefetch_row(h + ahead * plane.row_step[1], plane.length);
    }
    if (outside)
      add_row<false, false>(sums, g, g, p, steps, plane.length);
    else if (p_varies || q_varies)
      add_row<true, true>(sums, g, h, q_varies ? q : p, steps, plane.length);
    else
      add_row<true, false>(sums, g, h, p, steps, plane.length);
    if (plane.outside) sums.run<false, false>(g + plane.length, g, p, plane.outside);
  }
  sums.add_to(out);
}

// The sums of the mask over scattered elements, added to out.
template <class T>
void add_scattered(const void* g, const int64_t* g_at, const void* h, const int64_t* h_at,
                   int64_t n, double* out) {
  constexpr int sets = 4, ahead = 64;
  const T *first = (const T*)g, *second = (const T*)h;
  double sum[3][sets] = {};
  for (int64_t i = 0; i < n; ++i) {
    if (i + ahead < n) {
      __builtin_prefetch(first + g_at[i + ahead], 0, 2);
      __builtin_prefetch(second + h_at[i + ahead], 0, 2);
    }
    const double a = widen(first[g_at[i]]), b = widen(second[h_at[i]]);
    sum[0][i % sets] += a * a, sum[1][i % sets] += b * b, sum[2][i % sets] += a * b;
  }
  for (int k = 0; k < 3; ++k)
    for (int set = 0; set < sets; ++set) out[k] += sum[k][set];
}

template <class T>
constexpr Kernels kernels{add_plane<T>, add_scattered<T>};
