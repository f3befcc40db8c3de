// Steps of SGD and AdamW on some elements of a parameter, its gradient and its states.
//
// The order of the arithmetic is that of torch.optim, and so are its fused multiply-adds: fma() is
// written where torch's own kernels have one, and the compiler must make no other. Square roots are
// rounded correctly; torch's, where it takes them from MKL, may be off by one in the last place.

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off", "no-math-errno")
#endif

// Vectors, with the usual operators.
#if PK_AVX512
inline __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
// With a mask, because GCC 12 warns of the undefined operand that the others pass on.
inline __m512 square_root(__m512 a) { return _mm512_maskz_sqrt_ps(__mmask16(-1), a); }
inline __m512d square_root(__m512d a) { return _mm512_maskz_sqrt_pd(__mmask8(-1), a); }
inline __m512 all(float a) { return _mm512_set1_ps(a); }
inline __m512d all(double a) { return _mm512_set1_pd(a); }
#elif PK_AVX2
inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
inline __m256 square_root(__m256 a) { return _mm256_sqrt_ps(a); }
inline __m256d square_root(__m256d a) { return _mm256_sqrt_pd(a); }
inline __m256 all(float a) { return _mm256_set1_ps(a); }
inline __m256d all(double a) { return _mm256_set1_pd(a); }
#else
typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
template <class V>
inline V fma_lanes(V a, V b, V c) {
// A processor without the instruction has torch multiply, then add.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
inline Floats fma(Floats a, Floats b, Floats c) { return fma_lanes(a, b, c); }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return fma_lanes(a, b, c); }
inline Floats square_root(Floats a) {
  return Floats{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]),
                __builtin_sqrtf(a[3])};
}
inline Doubles square_root(Doubles a) {
  return Doubles{__builtin_sqrt(a[0]), __builtin_sqrt(a[1])};
}
inline Floats all(float a) { return Floats{a, a, a, a}; }
inline Doubles all(double a) { return Doubles{a, a}; }
#endif

// The vector of T, and its number of elements.
template <class T>
using Vector = decltype(all(T()));
template <class T>
inline constexpr int64_t width = sizeof(Vector<T>) / sizeof(T);

// The rules. Each changes p and the states m, v, where it has them.
template <class T>
struct Sgd {
  Vector<T> minus_lr, momentum, decay;
  bool has_momentum, nesterov, has_decay;

  explicit Sgd(const SgdOptions& o)
      : minus_lr(all(T(-o.lr))),
        momentum(all(T(o.momentum))),
        decay(all(T(o.weight_decay))),
        has_momentum(o.momentum != 0),
        nesterov(o.nesterov),
        has_decay(o.weight_decay != 0) {}

  void operator()(Vector<T>& p, Vector<T> g, Vector<T>& m, Vector<T>&) const {
    if (has_decay) g = fma(p, decay, g);
    if (has_momentum) {
      m = m * momentum + g;
      g = nesterov ? fma(m, momentum, g) : m;
    }
    p = fma(g, minus_lr, p);
  }
};

template <class T>
struct AdamW {
  Vector<T> decay, toward_g, beta2, one_minus_beta2, correction2, eps, minus_rate;
  bool from_g;

  explicit AdamW(const AdamWOptions& o)
      : decay(all(T(o.decay))),
        beta2(all(T(o.beta2))),
        one_minus_beta2(all(T(o.one_minus_beta2))),
        correction2(all(T(o.correction2))),
        eps(all(T(o.eps))),
        minus_rate(all(T(o.minus_rate))) {
    // torch.lerp starts at the end that is closer.
    const T weight = T(o.one_minus_beta1);
    from_g = !(weight < T(0.5));
    toward_g = all(from_g ? weight - T(1) : weight);
  }

  void operator()(Vector<T>& p, Vector<T> g, Vector<T>& m, Vector<T>& v) const {
    p = p * decay;
    m = fma(toward_g, g - m, from_g ? g : m);
    v = fma(one_minus_beta2 * g, g, v * beta2);
    const Vector<T> denominator = square_root(v) / correction2 + eps;
    p = p + minus_rate * m / denominator;
  }
};

// One element from memory and back, rounded to nearest even.
template <class T, class S>
inline T get(const S* at) {
  if constexpr (std::is_same<S, Bf16>::value)
    return std::bit_cast<float>(uint32_t(at->bits) << 16);
  else if constexpr (std::is_same<S, Fp16>::value)
#if PK_AVX2 || PK_AVX512
    return _cvtsh_ss(at->bits);
#else
    return half_to_float(*at);
#endif
  else
    return *at;
}

template <class T, class S>
inline void put(S* at, T value) {
  if constexpr (std::is_same<S, Bf16>::value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    at->bits = value == value ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
  } else if constexpr (std::is_same<S, Fp16>::value) {
#if PK_AVX2 || PK_AVX512
    at->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    *at = float_to_half(value);
#endif
  } else {
    *at = value;
  }
}

#if PK_AVX512
// The lanes in `mask` of a vector, the others 0; memory behind the others is not accessed.
inline __m512 load(const float* at, uint32_t mask) {
  return _mm512_maskz_loadu_ps(__mmask16(mask), at);
}
inline __m512d load(const double* at, uint32_t mask) {
  return _mm512_maskz_loadu_pd(__mmask8(mask), at);
}
inline __m512 load(const Bf16* at, uint32_t lanes) {
  const __mmask16 mask = __mmask16(lanes);
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, at);
  return _mm512_castsi512_ps(
      _mm512_maskz_slli_epi32(mask, _mm512_maskz_cvtepu16_epi32(mask, bits), 16));
}
inline __m512 load(const Fp16* at, uint32_t lanes) {
  const __mmask16 mask = __mmask16(lanes);
  return _mm512_maskz_cvtph_ps(mask, _mm256_maskz_loadu_epi16(mask, at));
}
inline void store(float* at, __m512 a, uint32_t mask) {
  _mm512_mask_storeu_ps(at, __mmask16(mask), a);
}
inline void store(double* at, __m512d a, uint32_t mask) {
  _mm512_mask_storeu_pd(at, __mmask8(mask), a);
}
inline void store(Bf16* at, __m512 a, uint32_t lanes) {
  const __mmask16 mask = __mmask16(lanes);
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(mask, bits, 16),
                                       _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i rounded = _mm512_maskz_srli_epi32(mask, sum, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(at, mask, _mm512_maskz_cvtepi32_epi16(mask, result));
}
inline void store(Fp16* at, __m512 a, uint32_t lanes) {
  const __mmask16 mask = __mmask16(lanes);
  _mm256_mask_storeu_epi16(at, mask,
                           _mm512_maskz_cvtps_ph(mask, a, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Whole vectors.
inline Vector<float> load(const float* at, uint32_t) {
  Vector<float> a;
  std::memcpy(&a, at, sizeof a);
  return a;
}
inline Vector<double> load(const double* at, uint32_t) {
  Vector<double> a;
  std::memcpy(&a, at, sizeof a);
  return a;
}
template <class S>
inline Vector<float> load(const S* at, uint32_t) {
  Vector<float> a;
  for (int i = 0; i < int(width<float>); ++i) a[i] = get<float>(at + i);
  return a;
}
template <class S, class V>
inline void store(S* at, V a, uint32_t) {
  if constexpr (sizeof(a[0]) == sizeof(S))
    std::memcpy(at, &a, sizeof a);
  else
    for (int i = 0; i < int(width<float>); ++i) put(at + i, a[i]);
}
#endif

// The pointers of a kernel, in their types: absent states are null.
template <class T, class P, class G>
struct Typed {
  P* p;
  const G* g;
  T *m, *v;

  explicit Typed(const Pointers& at)
      : p(reinterpret_cast<P*>(at[0])),
        g(reinterpret_cast<const G*>(at[1])),
        m(reinterpret_cast<T*>(at[2])),
        v(reinterpret_cast<T*>(at[3])) {}
};

template <class T, class P, class G, class Rule>
inline void step_vector(const Rule& rule, const Typed<T, P, G>& at, int64_t i, uint32_t mask) {
  Vector<T> p = load(at.p + i, mask), g = load(at.g + i, mask), m = all(T(0)), v = m;
  if (at.m) m = load(at.m + i, mask);
  if (at.v) v = load(at.v + i, mask);
  rule(p, g, m, v);
  store(at.p + i, p, mask);
  if (at.m) store(at.m + i, m, mask);
  if (at.v) store(at.v + i, v, mask);
}

// Elements of one stream, anywhere: element i is offsets[i] * stride bytes from base, or, where there
// are no offsets, i * stride.
template <class T, class S>
inline void gather(const char* base, const int64_t* offsets, int64_t stride, int64_t n, T* to) {
  if (!offsets)
    for (int64_t i = 0; i < n; ++i) to[i] = get<T>(reinterpret_cast<const S*>(base + i * stride));
  else if (stride == sizeof(S))
    for (int64_t i = 0; i < n; ++i) to[i] = get<T>(reinterpret_cast<const S*>(base) + offsets[i]);
  else
    for (int64_t i = 0; i < n; ++i)
      to[i] = get<T>(reinterpret_cast<const S*>(base + offsets[i] * stride));
}

template <class T, class S>
inline void scatter(const T* from, int64_t n, char* base, const int64_t* offsets, int64_t stride) {
  if (!offsets)
    for (int64_t i = 0; i < n; ++i) put(reinterpret_cast<S*>(base + i * stride), from[i]);
  else if (stride == sizeof(S))
    for (int64_t i = 0; i < n; ++i) put(reinterpret_cast<S*>(base) + offsets[i], from[i]);
  else
    for (int64_t i = 0; i < n; ++i)
      put(reinterpret_cast<S*>(base + offsets[i] * stride), from[i]);
}

inline constexpr int64_t block = 64;

// At most `block` elements. Those that adjoin are not copied.
template <class T, class P, class G, class Rule>
inline void step_scattered(const Rule& rule, const Pointers& base, const Offsets& offsets,
                           const Strides& strides, int64_t n) {
  alignas(64) T buffers[4][block];
  const auto there = [&](size_t s) {
    return n == block && !offsets[s] && strides[s] == sizeof(T) &&
           s >= (std::is_same_v<G, T> ? 1 : 2);
  };
  std::array<T*, 4> at;
  for (size_t s = 0; s < 4; ++s)
    at[s] = !base[s] ? nullptr : there(s) ? reinterpret_cast<T*>(base[s]) : buffers[s];
  const int64_t padded = (n + width<T> - 1) / width<T> * width<T>;
  for (int64_t i = n; i < padded; ++i)
    for (T* buffer : buffers) buffer[i] = 0;
  gather<T, P>(base[0], offsets[0], strides[0], n, at[0]);
  if (!there(1)) gather<T, G>(base[1], offsets[1], strides[1], n, at[1]);
  for (size_t s = 2; s < 4; ++s)
    if (at[s] && !there(s)) gather<T, T>(base[s], offsets[s], strides[s], n, at[s]);
  Typed<T, T, T> typed{Pointers{}};
  typed.p = at[0], typed.g = at[1], typed.m = at[2], typed.v = at[3];
  for (int64_t i = 0; i < n; i += width<T>) step_vector<T, T, T>(rule, typed, i, ~0u);
  scatter<T, P>(at[0], n, base[0], offsets[0], strides[0]);
  for (size_t s = 2; s < 4; ++s)
    if (at[s] && !there(s)) scatter<T, T>(at[s], n, base[s], offsets[s], strides[s]);
}

// Elements 0 ... n of adjoining memory.
template <class T, class P, class G, class Options, class Rule>
void run(const void* options, const Pointers& base, int64_t n) {
  const Rule rule(*static_cast<const Options*>(options));
  const Typed<T, P, G> at(base);
  int64_t i = 0;
  for (; i + width<T> <= n; i += width<T>) step_vector<T, P, G>(rule, at, i, ~0u);
  if (i == n) return;
#if PK_AVX512
  step_vector<T, P, G>(rule, at, i, (1u << (n - i)) - 1);
#else
  const Pointers rest{base[0] + i * int64_t(sizeof(P)), base[1] + i * int64_t(sizeof(G)),
                      base[2] ? base[2] + i * int64_t(sizeof(T)) : nullptr,
                      base[3] ? base[3] + i * int64_t(sizeof(T)) : nullptr};
  step_scattered<T, P, G>(rule, rest, {}, {sizeof(P), sizeof(G), sizeof(T), sizeof(T)}, n - i);
#endif
}

// Elements at any distance, as `gather` knows them.
template <class T, class P, class G, class Options, class Rule>
void list(const void* options, const Pointers& base, const Offsets& offsets, const Strides& strides,
          int64_t n) {
  // What random access has to wait for is asked for this many elements ahead, into the second cache:
  // far more misses can be under way to it than to the first, which halves the time.
  constexpr int64_t ahead = 192;
  const Rule rule(*static_cast<const Options*>(options));
  for (int64_t i = 0; i < n; i += block) {
    const int64_t count = std::min(block, n - i), next = std::min(i + ahead, n);
    Pointers at = base;
    Offsets some{};
    for (size_t s = 0; s < 4; ++s) {
      if (!base[s]) continue;
      if (!offsets[s]) {
        at[s] += i * strides[s];
        continue;
      }
      some[s] = offsets[s] + i;
      for (int64_t k = next; k < std::min(next + count, n); ++k)
        __builtin_prefetch(base[s] + offsets[s][k] * strides[s], 0, 2);
    }
    step_scattered<T, P, G>(rule, at, some, strides, count);
  }
}

// The elements of adjoining memory that `lines` names. What comes `ahead` lines later in the list
// is asked for, at a distance of `jump` bytes for each stream.
template <class T, class P, class G, class Options, class Rule>
void masked(const void* options, const Pointers& base, const Line* lines, int64_t count,
            int64_t ahead, const Strides& jump) {
  const Rule rule(*static_cast<const Options*>(options));
  constexpr int64_t size[] = {sizeof(P), sizeof(G), sizeof(T), sizeof(T)};
  [[maybe_unused]] int64_t offsets[block];
  [[maybe_unused]] int64_t filled = 0;
  [[maybe_unused]] const auto step_filled = [&] {
    step_scattered<T, P, G>(rule, base, {offsets, offsets, offsets, offsets},
                            {size[0], size[1], size[2], size[3]}, filled);
    filled = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t next = int64_t(lines[std::min(i + ahead, count - 1)].index) * line_size;
    for (size_t s = 0; s < 4; ++s)
      if (base[s]) __builtin_prefetch(base[s] + next * size[s] + jump[s], 0, 2);
    const int64_t first = int64_t(lines[i].index) * line_size;
    uint32_t mask = lines[i].mask;
#if PK_AVX512
    for (int64_t k = 0; k < line_size; k += width<T>, mask >>= width<T>)
      if (width<T> == line_size || mask)
        step_vector<T, P, G>(rule, Typed<T, P, G>(base), first + k, mask);
#else
    if (mask == (1u << line_size) - 1) {
      for (int64_t k = 0; k < line_size; k += width<T>)
        step_vector<T, P, G>(rule, Typed<T, P, G>(base), first + k, mask);
      continue;
    }
    for (; mask; mask &= mask - 1) offsets[filled++] = first + std::countr_zero(mask);
    if (filled > block - line_size) step_filled();
#endif
  }
#if !PK_AVX512
  step_filled();
#endif
}

// Writes to `lines` those of n elements that have any element inside, the bits from `first` on; returns
// how many. There are 8 bytes that may be read behind the last bit.
inline int64_t find_lines(const uint8_t* bits, int64_t first, int64_t n, Line* lines) {
  constexpr uint64_t line_mask = (uint64_t(1) << line_size) - 1;
  Line* to = lines;
  for (int64_t i = 0; i < n; i += 64) {
    const uint8_t* at = bits + (first + i) / 8;
    const int64_t shift = (first + i) % 8;
    uint64_t word;
    std::memcpy(&word, at, sizeof word);
    if (shift) word = word >> shift | uint64_t(at[8]) << (64 - shift);
    if (n - i < 64) word &= (uint64_t(1) << (n - i)) - 1;
    while (word) {
      const int64_t k = std::countr_zero(word) / line_size, from = k * line_size;
      *to++ = {int32_t(i / line_size + k), uint32_t(word >> from & line_mask)};
      word &= ~(line_mask << from);
    }
  }
  return to - lines;
}

template <class Rule32, class Rule64, class Options>
inline Kernels of_dtypes(Dtypes dtypes) {
  switch (dtypes) {
    case Dtypes::fp32:
      return {&run<float, float, float, Options, Rule32>,
              &list<float, float, float, Options, Rule32>,
              &masked<float, float, float, Options, Rule32>, &find_lines};
    case Dtypes::bf16:
      return {&run<float, Bf16, Bf16, Options, Rule32>, &list<float, Bf16, Bf16, Options, Rule32>,
              &masked<float, Bf16, Bf16, Options, Rule32>, &find_lines};
    case Dtypes::bf16_fp32:
      return {&run<float, Bf16, float, Options, Rule32>, &list<float, Bf16, float, Options, Rule32>,
              &masked<float, Bf16, float, Options, Rule32>, &find_lines};
    case Dtypes::fp16:
      return {&run<float, Fp16, Fp16, Options, Rule32>, &list<float, Fp16, Fp16, Options, Rule32>,
              &masked<float, Fp16, Fp16, Options, Rule32>, &find_lines};
    case Dtypes::fp16_fp32:
      return {&run<float, Fp16, float, Options, Rule32>, &list<float, Fp16, float, Options, Rule32>,
              &masked<float, Fp16, float, Options, Rule32>, &find_lines};
    case Dtypes::fp64:
      break;
  }
  return {&run<double, double, double, Options, Rule64>,
          &list<double, double, double, Options, Rule64>,
          &masked<double, double, double, Options, Rule64>, &find_lines};
}

inline Kernels sgd_kernels(Dtypes dtypes) {
  return of_dtypes<Sgd<float>, Sgd<double>, SgdOptions>(dtypes);
}

inline Kernels adamw_kernels(Dtypes dtypes) {
  return of_dtypes<AdamW<float>, AdamW<double>, AdamWOptions>(dtypes);
}

#if !defined(__clang__)
#pragma GCC pop_options
#endif
