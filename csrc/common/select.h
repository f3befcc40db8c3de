// The k largest magnitudes of a row. Compiled once for each ISA: see foreach_isa.h.
//
// Magnitudes are compared as integers, their bits: in that order NaN comes after infinity. Most rows
// resemble the one before: a threshold a little below that row's k-th magnitude leaves few
// candidates, in one pass over memory.

constexpr uint32_t infinity = 0x7f800000;

// Bits of an fp32 number without its sign, from those of an fp32 or a bf16 one.
inline uint32_t magnitude(uint32_t bits) { return bits & 0x7fffffff; }
inline uint32_t magnitude(uint16_t bits) { return uint32_t(bits & 0x7fff) << 16; }

// Of NaNs none is larger than another.
inline uint32_t key(auto bits) { return std::min(magnitude(bits), infinity + 1); }

// Keys of the adjoining numbers that fill a register.
#if PK_AVX512
inline __m512i keys_of(const uint32_t* from) {
  const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(from), _mm512_set1_epi32(0x7fffffff));
  // Zero-masked, as below: of the plain ones GCC warns that they read what is not initialised.
  return _mm512_maskz_min_epu32(0xffff, bits, _mm512_set1_epi32(infinity + 1));
}
inline __m512i keys_of(const uint16_t* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  __m512i bits = _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16);
  bits = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  return _mm512_maskz_min_epu32(0xffff, bits, _mm512_set1_epi32(infinity + 1));
}
#elif PK_AVX2
inline __m256i keys_of(const uint32_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm256_min_epu32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)),
                          _mm256_set1_epi32(infinity + 1));
}
inline __m256i keys_of(const uint16_t* from) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
  return _mm256_min_epu32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)),
                          _mm256_set1_epi32(infinity + 1));
}
#endif

// The keys of the row that are `least` or more, and their positions, in order. Stops after `most`;
// there must be room for 16 more. Returns how many there are.
template <class T>
int64_t candidates(const T* row, int64_t n, uint32_t least, int64_t most, Candidates to) {
  int64_t found = 0, i = 0;
#if PK_AVX512
  const __m512i threshold = _mm512_set1_epi32(int(least));
  __m512i position = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (; i + 16 <= n && found <= most; i += 16) {
    const __m512i keys = keys_of(row + i);
    const __mmask16 inside = _mm512_cmpge_epu32_mask(keys, threshold);
    // Compressed in the register: compressing to memory is many times slower on some processors.
    _mm512_storeu_si512(to.keys + found, _mm512_maskz_compress_epi32(inside, keys));
    _mm512_storeu_si512(to.positions + found, _mm512_maskz_compress_epi32(inside, position));
    found += std::popcount(unsigned(inside));
    position = _mm512_add_epi32(position, _mm512_set1_epi32(16));
  }
#elif PK_AVX2
  // Keys are less than 2^31, and so is what may not be exceeded: it is -1 for least = 0.
  const __m256i threshold = _mm256_set1_epi32(int(least) - 1);
  for (; i + 8 <= n && found <= most; i += 8) {
    const __m256i inside = _mm256_cmpgt_epi32(keys_of(row + i), threshold);
    unsigned mask = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(inside)));
    for (; mask; mask &= mask - 1, ++found) {
      const int64_t at = i + std::countr_zero(mask);
      to.keys[found] = key(row[at]);
      to.positions[found] = uint32_t(at);
    }
  }
#endif
  for (; i < n && found <= most; ++i) {
    // Written always, and kept if it is one of them.
    to.keys[found] = key(row[i]);
    to.positions[found] = uint32_t(i);
    found += to.keys[found] >= least;
  }
  return found;
}

template <class T>
int64_t count_from(const T* row, int64_t n, uint32_t least) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += int32_t(key(row[i])) >= int32_t(least);
  return count;
}

// Keys are counted by so many, and zeros, which change nothing, fill the last of them up. As signed
// numbers, which every ISA compares; the compiler splits what is wider than a register.
constexpr int64_t group = 16;
typedef int32_t Group __attribute__((vector_size(4 * group)));
typedef int32_t GroupInMemory __attribute__((vector_size(4 * group), aligned(4), may_alias));

// By reference: how wide vectors are passed depends on the ISA.
inline void keep_smaller(Group& a, const Group& b) { a = b < a ? b : a; }
inline void keep_larger(Group& a, const Group& b) { a = b > a ? b : a; }
inline void add(Group& a, const Group& b) { a += b; }

template <int k, size_t... j>
void combine_halves(Group& a, auto combine, std::index_sequence<j...>) {
  combine(a, __builtin_shufflevector(a, a, ((int(j) + k) % int(group))...));
}

// All lanes' sum, minimum or maximum.
template <int k = group / 2>
int32_t reduced(Group& a, auto combine) {
  combine_halves<k>(a, combine, std::make_index_sequence<size_t(group)>{});
  if constexpr (k > 1) return reduced<k / 2>(a, combine);
  return a[0];
}

// How many of n keys are `middle` or more, the least of these, and the most of the others.
struct Split {
  int64_t count;
  uint32_t least, most;
};

inline Split split(const uint32_t* keys, int64_t n, uint32_t middle) {
  const Group none = Group{} + int32_t(infinity + 1), limit = Group{} + int32_t(middle);
  Group least = none, most{}, count{};
  for (int64_t i = 0; i < n; i += group) {
    const Group some = *reinterpret_cast<const GroupInMemory*>(keys + i), inside = some >= limit;
    count -= inside;
    keep_smaller(least, inside ? some : none);
    keep_larger(most, inside ? Group{} : some);
  }
  return {reduced(count, add), uint32_t(reduced(least, keep_smaller)),
          uint32_t(reduced(most, keep_larger))};
}

// The k-th largest of n keys, 1 <= k <= n, a multiple of `group`.
inline uint32_t kth_key(const uint32_t* keys, int64_t n, int64_t k) {
  Group least = *reinterpret_cast<const GroupInMemory*>(keys), most = least;
  for (int64_t i = group; i < n; i += group) {
    const Group some = *reinterpret_cast<const GroupInMemory*>(keys + i);
    keep_smaller(least, some), keep_larger(most, some);
  }
  auto low = uint32_t(reduced(least, keep_smaller)), high = uint32_t(reduced(most, keep_larger));
  // Two of the keys: there are `from_low` >= k of `low` or more, and `above` < k of more than `high`.
  int64_t from_low = n, above = 0;
  for (bool halve = false; low < high; halve = !halve) {
    if (from_low == k) return low;
    if (above == k - 1) return high;
    // Where it is if they are spread evenly; every other time the middle, so that this ends soon.
    const double share = halve ? 0.5 : double(from_low - k) / double(from_low - above);
    const uint32_t middle = low + 1 + uint32_t(double(high - low - 1) * share);
    const Split parts = split(keys, n, middle);
    if (parts.count >= k)
      low = parts.least, from_low = parts.count;
    else
      high = parts.most, above = parts.count;
  }
  return low;
}

// The number of keys with the zeros that follow them now.
inline int64_t filled(uint32_t* keys, int64_t n) {
  std::fill_n(keys + n, group, 0u);
  return (n + group - 1) / group * group;
}

// A key a little below what is perhaps the next row's k-th: the fewer, the more it varies.
inline uint32_t guess_below(uint32_t kth, int64_t k) {
  if (kth >= infinity) return kth;
  return std::bit_cast<uint32_t>(std::bit_cast<float>(kth) * (k < 32 ? 0.85f : 0.93f));
}

// A key from which on there are about twice k of the row's, as some of its elements tell.
template <class T>
uint32_t sampled_guess(const T* row, int64_t n, int64_t k) {
  constexpr int64_t most = 4096;
  uint32_t keys[most + group];
  const int64_t step = std::max<int64_t>(8, n / most + 1), size = n / step;
  for (int64_t i = 0; i < size; ++i) keys[i] = key(row[i * step]);
  const int64_t rank = 2 * k / step + 3;
  return rank > size ? 0 : kth_key(keys, filled(keys, size), rank);
}

// Writes the first k positions of candidates whose key is more than `kth`, or is `kth` and among the
// first `ties` of these.
inline void emit(const Candidates& from, int64_t k, uint32_t kth, int64_t ties, int64_t* out) {
  int64_t written = 0, i = 0;
#if PK_AVX512
  for (; written + 16 <= k; i += 16) {
    const __m512i keys = _mm512_loadu_si512(from.keys + i), limit = _mm512_set1_epi32(int(kth));
    const unsigned equal = _mm512_cmpeq_epu32_mask(keys, limit);
    // The first `ties` of its bits.
    const unsigned some = ties < 16 ? _pdep_u32((1u << ties) - 1, equal) : equal;
    ties -= std::popcount(some);
    const unsigned inside = some | _mm512_cmpgt_epu32_mask(keys, limit);
    const __m512i positions = _mm512_maskz_compress_epi32(
        __mmask16(inside), _mm512_loadu_si512(from.positions + i));
    const __m256i low = _mm512_maskz_extracti64x4_epi64(0xff, positions, 0);
    const __m256i high = _mm512_maskz_extracti64x4_epi64(0xff, positions, 1);
    _mm512_storeu_si512(out + written, _mm512_maskz_cvtepu32_epi64(0xff, low));
    _mm512_storeu_si512(out + written + 8, _mm512_maskz_cvtepu32_epi64(0xff, high));
    written += std::popcount(inside);
  }
#endif
  for (; written < k; ++i) {
    out[written] = from.positions[i];
    const bool tie = from.keys[i] == kth;
    written += from.keys[i] > kth || (tie && ties > 0);
    ties -= tie;
  }
}

// Writes the positions of all `count` < k candidates, which are all that is not zero, and the first of
// the others.
inline void emit_with_zeros(const Candidates& from, int64_t count, int64_t k, int64_t* out) {
  const int64_t zeros = k - count;
  int64_t i = 0;
  while (i < count && int64_t(from.positions[i]) - i < zeros) ++i;
  // Up to here everything is taken.
  std::iota(out, out + zeros + i, int64_t(0));
  std::copy(from.positions + i, from.positions + count, out + zeros + i);
}

// Writes the positions of the k largest magnitudes of a row, 1 <= k <= n, in ascending order; of
// equal ones, those that come first. Whatever `guess` is: it is for speed alone.
template <class T>
void select_row(const T* row, int64_t n, int64_t k, Scratch& scratch, int64_t* out) {
  const int64_t few = std::min(3 * k + 64, n);
  // Zeros are no candidates: where they are too few without, the first zeros are taken.
  uint32_t least = std::max(scratch.guess, 1u);
  int64_t count = candidates(row, n, least, few, scratch.room(few));
  const auto useless = [&] { return count > few || (count < k && least > 1); };
  if (useless()) {
    least = std::max(sampled_guess(row, n, k), 1u);
    count = candidates(row, n, least, few, scratch.room(few));
    if (useless()) {
      if (count < k) least = 1;
      const int64_t all = count_from(row, n, least);
      count = candidates(row, n, least, n, scratch.room(all));
    }
  }
  const Candidates found = scratch.room(0);
  if (count < k) {
    emit_with_zeros(found, count, k, out);
    scratch.guess = 0;
    return;
  }
  const int64_t padded = filled(found.keys, count);
  const uint32_t kth = kth_key(found.keys, padded, k);
  emit(found, k, kth, k - split(found.keys, padded, kth + 1).count, out);
  scratch.guess = guess_below(kth, k);
}

// sums[c] += the magnitudes of column c, of `columns` adjoining ones; always in the same order.
template <class T>
void add_columns(const T* from, int64_t ld, int64_t rows, int64_t columns, double* sums) {
  const auto size = [](T bits) { return double(std::bit_cast<float>(magnitude(bits))); };
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4, from += 4 * ld)
    for (int64_t c = 0; c < columns; ++c)
      sums[c] += (size(from[c]) + size(from[c + ld])) +
                 (size(from[c + 2 * ld]) + size(from[c + 3 * ld]));
  for (; r < rows; ++r, from += ld)
    for (int64_t c = 0; c < columns; ++c) sums[c] += size(from[c]);
}

template <class T>
constexpr Kernels<T> kernels{&select_row<T>, &add_columns<T>};
