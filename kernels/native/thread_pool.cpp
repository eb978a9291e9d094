#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#ifdef __unix__
#include <pthread.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define GRAPHPRUNE_PAUSE() __builtin_ia32_pause()
#else
#define GRAPHPRUNE_PAUSE() std::this_thread::yield()
#endif

namespace graphprune {
namespace {

constexpr int kSpins = 2000;  // some 10 to 50 us: layers follow each other sooner than that

class Pool {
 public:
  // False while another caller is served.
  bool run(int parts, Part work, void* argument) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    grow(parts - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      argument_ = argument;
      parts_ = parts;
      next_.store(1, std::memory_order_relaxed);
      busy_.store(threads_, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(argument, 0);
    take_parts();
    for (int spin = 0; spin < kSpins && busy_.load(std::memory_order_acquire); ++spin) {
      GRAPHPRUNE_PAUSE();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return !busy_.load(std::memory_order_acquire); });
    return true;
  }

 private:
  // Threads beyond those that a call needs would only wake up for nothing, but calls rarely differ.
  void grow(int threads) {
    while (threads_ < threads) {
      try {
        // Detached: they wait forever, and end with the process.
        std::thread(&Pool::serve, this, round_.load(std::memory_order_relaxed)).detach();
      } catch (...) {
        return;
      }
      ++threads_;
    }
  }

  void take_parts() {
    for (;;) {
      const int part = next_.fetch_add(1, std::memory_order_relaxed);
      if (part >= parts_) return;
      work_(argument_, part);
    }
  }

  void serve(unsigned seen) {
    for (;;) {
      for (int spin = 0; spin < kSpins && round_.load(std::memory_order_acquire) == seen; ++spin) {
        GRAPHPRUNE_PAUSE();
      }
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
        seen = round_.load(std::memory_order_relaxed);
      }
      take_parts();
      std::lock_guard<std::mutex> lock(mutex_);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<unsigned> round_{0};
  std::atomic<int> next_{0}, busy_{0};
  Part work_ = nullptr;
  void* argument_ = nullptr;
  int parts_ = 0, threads_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};

// The child of a fork has none of the threads, and the locks are in any state: it starts anew.
void forget_pool() { the_pool.store(nullptr, std::memory_order_relaxed); }

Pool* pool() {
  Pool* found = the_pool.load(std::memory_order_acquire);
  if (found) return found;
  Pool* made = new (std::nothrow) Pool;
  if (!made || the_pool.compare_exchange_strong(found, made)) return made;
  delete made;
  return found;
}

#ifdef __unix__
const int watching = pthread_atfork(nullptr, nullptr, forget_pool);
#endif

}  // namespace

void run_parts(int parts, Part work, void* argument) {
  if (parts > 1) {
    Pool* threads = pool();
    if (threads && threads->run(parts, work, argument)) return;
  }
  for (int part = 0; part < parts; ++part) work(argument, part);
}

}  // namespace graphprune
