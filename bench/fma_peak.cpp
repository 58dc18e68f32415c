// Peak rate of float32 multiply-adds: independent chains in registers, one thread a core asked for.
// Usage: fma_peak THREADS. Prints GFLOP/s, the best of several short intervals.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr int kLanes = VECTOR_BYTES / 4;
constexpr int kChains = 12;  // two units × latency 4 and some, within 16 registers
constexpr long kSteps = 2'000'000;
constexpr int kIntervals = 40;

float chains(float start) {
  Vector sums[kChains];
  Vector factor = Vector{} + 0.999f, term = Vector{} + start;
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) sums[c] = Vector{} + static_cast<float>(c);
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * factor + term;
  }
  Vector total{};
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) total += sums[c];
  return total[0] + total[kLanes - 1];
}

double interval(int threads) {
  std::atomic<int> ready{0};
  std::vector<std::thread> pool;
  std::vector<float> results(threads);
  auto work = [&](int t) {
    for (++ready; ready < threads;) std::this_thread::yield();  // start together
    results[t] = chains(0.001f * static_cast<float>(t + 1));
  };
  const auto start = std::chrono::steady_clock::now();
  for (int t = 0; t < threads; ++t) pool.emplace_back(work, t);
  for (auto& thread : pool) thread.join();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  volatile float kept = results[0];
  (void)kept;
  return 2.0 * kLanes * kChains * kSteps * threads / seconds.count() / 1e9;
}

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::max(1, std::atoi(arguments[1])) : 1;
  double best = 0;
  for (int i = 0; i < kIntervals; ++i) best = std::max(best, interval(threads));
  std::printf("%.1f\n", best);
}
