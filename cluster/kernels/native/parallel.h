// Threads for the kernels: those of the OpenMP runtime that torch computes with, so that a process has one set of them.
// Knows no kernel. Its symbols are found by library.py; without them a kernel runs on the calling thread alone.
#pragma once

namespace moe {

struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel of GCC's libgomp
    void (*barrier)();                                             // GOMP_barrier
    int (*thread)();                                               // omp_get_thread_num
    int (*size)();                                                 // omp_get_num_threads
};

extern OpenMP openmp;

// One thread's view of a region.
struct Team {
    int thread;
    int size;
    // All threads of the region have come here before any goes on.
    void wait() const {
        if (size > 1) openmp.barrier();
    }
};

// Hands out the numbers below `count`, some at a time, to whichever thread asks.
struct Counter {
    long next;

    bool take(long count, long step, long* first, long* stop) {
        *first = __atomic_fetch_add(&next, step, __ATOMIC_RELAXED);
        *stop = *first + step < count ? *first + step : count;
        return *first < count;
    }
};

// Hands out a counter's numbers to one thread, which knows its next ones while it works at the first.
struct Pieces {
    Counter* counter;
    long count, step;
    long first, stop;            // at work
    long next_first, next_stop;  // next_first is `count` or more where nothing is left

    Pieces(Counter& from, long count, long step) : counter(&from), count(count), step(step), first(count), stop(count) {
        counter->take(count, step, &next_first, &next_stop);
    }
    bool take() {
        first = next_first, stop = next_stop;
        if (first >= count) return false;
        counter->take(count, step, &next_first, &next_stop);
        return true;
    }
    bool has_next() const { return next_first < count; }
};

// Calls work(Team) on `num_threads` threads and returns when all have.
template <class Work>
inline void parallel(int num_threads, Work& work) {
    if (num_threads <= 1 || !openmp.parallel) {
        work(Team{0, 1});
        return;
    }
    openmp.parallel([](void* data) { (*static_cast<Work*>(data))(Team{openmp.thread(), openmp.size()}); }, &work,
                    static_cast<unsigned>(num_threads), 0);
}

}  // namespace moe
