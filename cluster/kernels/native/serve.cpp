// A shard's loop for the usual request: few rows in shared memory, of a layer and experts that are here. One call takes
// requests from one socket, computes and answers them until anything else happens. cluster/stream/steady.py calls it.
#if defined(__linux__)
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include "frame.h"
#include "kernels.h"

namespace moe {

// places [E]: of each expert in gate_up and down, [L], or -1. counts [E]: slots computed, which grow.
// most_pairs: requests with so many slots are not taken.
struct ServedLayer {
    const int64_t* places;
    const void* const* gate_up;
    const void* const* down;
    int64_t* counts;
    int64_t num_experts, most_pairs;
};

struct Served {
    int64_t rows;
    double waited_s, computed_s;
};

// One caller, and a shard's experts. Layers without experts have no places. log: a ring of what was computed, which the
// other side reads up to `logged` and then sets `taken`.
struct Serving {
    const Kernels* kernels;
    const ServedLayer* layers;
    char* slots;       // shared with the caller
    char* buffer;      // bytes that have come, `filled` of them
    int64_t* ids;      // [most_rows * most_slots]
    float* out;        // [most_rows, H]
    void* scratch;
    Served* log;
    int64_t num_layers, E, H, I, slot_bytes, num_slots, buffer_bytes, most_rows, most_slots, log_size;
    int64_t up_stride, down_stride;
    int64_t filled, logged, taken;
    int32_t socket, wake, dtype, form, least_timeout_ms, threads;
    int32_t stop;       // set by the other side: come back
    int32_t computing;  // 1 during a product
    Frame answer;       // the last, of which `unsent` bytes are left
    int32_t unsent;
};

namespace {

enum Outcome : int32_t { kNext = -1, kAsked = 0, kUnusual = 1, kUnsent = 2 };

// Each slot's place in the layer's weights; false for an expert that is elsewhere.
bool localize(Serving& s, const ServedLayer& layer, const int32_t* wire, int64_t num) {
    for (int64_t i = 0; i < num; i++) {
        if (wire[i] >= s.E || (wire[i] >= 0 && layer.places[wire[i]] < 0)) return false;
        s.ids[i] = wire[i] < 0 ? -1 : layer.places[wire[i]];
    }
    for (int64_t i = 0; i < num; i++) {
        if (wire[i] >= 0) layer.counts[wire[i]]++;
    }
    return true;
}

bool is_usual(const Serving& s, const Frame& head) {
    if (!is_frame(head, kRequest) || head.dtype != s.dtype || head.hidden_size != s.H) return false;
    if (head.rows < 1 || head.rows > s.most_rows || head.topk < 1 || head.topk > s.most_slots) return false;
    if (head.slot < 1 || head.slot > s.num_slots) return false;
    if (head.timeout_ms < static_cast<uint32_t>(s.least_timeout_ms)) return false;
    if (head.payload_bytes != 8ull * head.rows * head.topk || head.layer_id >= s.num_layers) return false;
    const ServedLayer& layer = s.layers[head.layer_id];
    return layer.places && head.rows * head.topk < layer.most_pairs;
}

void compute(Serving& s, const ServedLayer& layer, const Frame& head, const float* weights, char* rows) {
    const int64_t T = head.rows, S = head.topk, L = layer.num_experts;
    if (s.form) {
        s.kernels->experts_quantized(s.dtype, s.form, rows, s.H, s.ids, weights, T, S, layer.gate_up, s.up_stride,
                                     layer.down, s.down_stride, L, s.H, s.I, s.out, s.scratch, s.threads);
    } else {
        s.kernels->experts(s.dtype, rows, s.H, s.ids, weights, T, S, layer.gate_up, layer.down, L, s.H, s.I, s.out,
                           s.scratch, s.threads);
    }
    if (s.dtype == kFloat32) {
        memcpy(rows, s.out, T * s.H * sizeof(float));
    } else {
        uint16_t* to = reinterpret_cast<uint16_t*>(rows);
        for (int64_t i = 0; i < T * s.H; i++) to[i] = rounded(s.out[i]);
    }
}

Outcome answer(Serving& s, const Frame& head) {
    s.answer = new_frame(kAnswer);
    s.answer.dtype = head.dtype;
    s.answer.request_id = head.request_id;
    s.answer.layer_id = head.layer_id;
    s.answer.rows = head.rows;
    s.answer.hidden_size = head.hidden_size;
    s.answer.slot = head.slot;
    s.answer.checksum = checksum(s.answer, nullptr, 0);
    const ssize_t sent = send(s.socket, &s.answer, sizeof s.answer, MSG_DONTWAIT | MSG_NOSIGNAL);
    s.unsent = static_cast<int32_t>(sizeof s.answer - (sent > 0 ? sent : 0));
    return s.unsent ? kUnsent : kNext;
}

// Computes the first request of the buffer, if it is whole: kNext, and nothing done where it is not.
Outcome take(Serving& s) {
    Frame head;
    memcpy(&head, s.buffer, sizeof head);
    if (!is_usual(s, head)) return kUnusual;
    const int64_t num = head.rows * head.topk, size = sizeof head + 8 * num;
    if (s.filled < size) return kNext;
    const char* payload = s.buffer + sizeof head;
    const ServedLayer& layer = s.layers[head.layer_id];
    if (checksum(head, payload, 4 * num) != head.checksum) return kUnusual;
    // The payload begins at a multiple of 4 in memory that a vector could be read from.
    if (!localize(s, layer, reinterpret_cast<const int32_t*>(payload), num)) return kUnusual;
    const double waited = seconds(CLOCK_REALTIME) - head.sent_at, began = seconds(CLOCK_MONOTONIC);
    __atomic_store_n(&s.computing, 1, __ATOMIC_RELAXED);
    compute(s, layer, head, reinterpret_cast<const float*>(payload + 4 * num), s.slots + (head.slot - 1) * s.slot_bytes);
    __atomic_store_n(&s.computing, 0, __ATOMIC_RELAXED);
    s.log[s.logged % s.log_size] = {head.rows, waited > 0 ? waited : 0, seconds(CLOCK_MONOTONIC) - began};
    __atomic_store_n(&s.logged, s.logged + 1, __ATOMIC_RELEASE);
    s.filled -= size;
    memmove(s.buffer, s.buffer + size, s.filled);
    return answer(s, head);
}

}  // namespace
}  // namespace moe

extern "C" {

// Serves until it is stopped or `wake` can be read (0), until bytes have come that are no usual request (1; they are in
// the buffer), or until an answer could not be sent whole (2). Blocks.
int32_t moe_serve(moe::Serving* serving) {
    using namespace moe;
    Serving& s = *serving;
    for (;;) {
        if (__atomic_load_n(&s.stop, __ATOMIC_ACQUIRE)) return kAsked;
        if (s.logged - __atomic_load_n(&s.taken, __ATOMIC_ACQUIRE) >= s.log_size) return kAsked;
        pollfd both[2] = {{s.socket, POLLIN, 0}, {s.wake, POLLIN, 0}};
        if (poll(both, 2, -1) < 0 && errno != EINTR) return kUnusual;
        if (both[1].revents) return kAsked;
        const ssize_t count = recv(s.socket, s.buffer + s.filled, s.buffer_bytes - s.filled, MSG_DONTWAIT);
        if (count < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        if (count <= 0) return kUnusual;
        s.filled += count;
        while (s.filled >= static_cast<int64_t>(sizeof(Frame))) {
            const int64_t before = s.filled;
            const Outcome outcome = take(s);
            if (outcome != kNext) return outcome;
            if (s.filled == before) break;
        }
    }
}

}  // extern "C"
#endif
