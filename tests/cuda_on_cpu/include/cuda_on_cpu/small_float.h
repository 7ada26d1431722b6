// The part common to __half and __nv_bfloat16: a 16-bit storage type that computes in float and rounds to nearest even.
// Assignment from a function's result is spelled out, because g++ does not instrument `*p = f()` for a class: without
// it the checker would not see the store.
#pragma once

#define CUDA_ON_CPU_SMALL_FLOAT(T, encode, decode)                                              \
  struct alignas(2) T {                                                                         \
    unsigned short bits;                                                                        \
    T() = default;                                                                              \
    T(const T&) = default;                                                                      \
    T& operator=(const T&) = default;                                                           \
    __attribute__((always_inline)) T& operator=(T&& b) {                                        \
      bits = b.bits;                                                                            \
      return *this;                                                                             \
    }                                                                                           \
    T(float x) : bits(encode(x)) {}                                                             \
    T(double x) : T(static_cast<float>(x)) {}                                                   \
    T(int x) : T(static_cast<float>(x)) {}                                                      \
    T(unsigned x) : T(static_cast<float>(x)) {}                                                 \
    T(long long x) : T(static_cast<float>(x)) {}                                                \
    operator float() const { return decode(bits); }                                             \
    T& operator+=(T b) { return *this = T(static_cast<float>(*this) + static_cast<float>(b)); } \
    T& operator-=(T b) { return *this = T(static_cast<float>(*this) - static_cast<float>(b)); } \
    T& operator*=(T b) { return *this = T(static_cast<float>(*this) * static_cast<float>(b)); } \
    T& operator/=(T b) { return *this = T(static_cast<float>(*this) / static_cast<float>(b)); } \
  };                                                                                            \
  struct alignas(4) T##2 {                                                                      \
    T x, y;                                                                                     \
    T##2() = default;                                                                           \
    T##2(T x_, T y_) : x(x_), y(y_) {}                                                          \
  };                                                                                            \
  inline T operator+(T a, T b) { return T(static_cast<float>(a) + static_cast<float>(b)); }     \
  inline T operator-(T a, T b) { return T(static_cast<float>(a) - static_cast<float>(b)); }     \
  inline T operator*(T a, T b) { return T(static_cast<float>(a) * static_cast<float>(b)); }     \
  inline T operator/(T a, T b) { return T(static_cast<float>(a) / static_cast<float>(b)); }     \
  inline T operator-(T a) { return T(-static_cast<float>(a)); }                                 \
  inline bool operator<(T a, T b) { return static_cast<float>(a) < static_cast<float>(b); }     \
  inline bool operator>(T a, T b) { return static_cast<float>(a) > static_cast<float>(b); }     \
  inline bool operator<=(T a, T b) { return static_cast<float>(a) <= static_cast<float>(b); }   \
  inline bool operator>=(T a, T b) { return static_cast<float>(a) >= static_cast<float>(b); }   \
  inline bool operator==(T a, T b) { return static_cast<float>(a) == static_cast<float>(b); }   \
  inline bool operator!=(T a, T b) { return !(a == b); }                                        \
  inline T __hadd(T a, T b) { return a + b; }                                                   \
  inline T __hsub(T a, T b) { return a - b; }                                                   \
  inline T __hmul(T a, T b) { return a * b; }                                                   \
  inline T __hdiv(T a, T b) { return a / b; }                                                   \
  inline T __hneg(T a) { return -a; }                                                           \
  inline T __hfma(T a, T b, T c) {                                                              \
    return T(fmaf(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c)));        \
  }                                                                                             \
  inline T __hmax(T a, T b) { return T(fmaxf(static_cast<float>(a), static_cast<float>(b))); }  \
  inline T __hmin(T a, T b) { return T(fminf(static_cast<float>(a), static_cast<float>(b))); }  \
  inline bool __hisnan(T a) { return static_cast<float>(a) != static_cast<float>(a); }          \
  inline float __low2float(T##2 a) { return a.x; }                                              \
  inline float __high2float(T##2 a) { return a.y; }                                             \
  inline T##2 __hadd2(T##2 a, T##2 b) { return T##2(a.x + b.x, a.y + b.y); }                    \
  inline T##2 __hmul2(T##2 a, T##2 b) { return T##2(a.x * b.x, a.y * b.y); }                    \
  inline T##2 __hfma2(T##2 a, T##2 b, T##2 c) { return T##2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)); }
