// An engine's side of the usual crossing: few rows of one layer to all shards through shared memory, and the sums of
// what comes back. cluster/stream/lanes.py calls it; the definition is in Python (cluster/experts/calls.py, dispatch.py).
#if defined(__linux__)
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include "frame.h"
#include "kernels.h"

namespace moe {

// One shard's connection. rows: memory of `slot`, shared with it; row_ids [most_rows]: of the last request, ascending.
// got: bytes of an answer, `filled` of them.
struct Lane {
    char* rows;
    int64_t* row_ids;
    int64_t num_rows;
    uint64_t request_id;
    double sent_at;
    int32_t socket;
    uint32_t slot;
    Frame got;
    int32_t filled;
};

struct Crossed {
    int64_t lane, rows;
    double round_trip_s, waited_s;
};

// shard_of [num_layers, E]: the lane of each expert. sum: [most_rows, H]. log: of answers, a ring.
struct Crossing {
    Lane* lanes;
    const int32_t* shard_of;
    float* sum;
    char* frame;
    Crossed* log;
    int64_t num_lanes, num_layers, E, H, most_rows, most_slots, log_size, logged;
    uint64_t epoch;
    int32_t dtype;
    uint32_t timeout_ms;
};

namespace {

// The rows of each lane; false for an id that no expert has.
bool choose_rows(Crossing& c, int64_t layer_id, const int64_t* ids, int64_t T, int64_t S) {
    for (int64_t i = 0; i < c.num_lanes; i++) c.lanes[i].num_rows = 0;
    for (int64_t t = 0; t < T; t++) {
        for (int64_t s = 0; s < S; s++) {
            const int64_t id = ids[t * S + s];
            if (id >= c.E) return false;
            if (id < 0) continue;
            Lane& lane = c.lanes[c.shard_of[layer_id * c.E + id]];
            if (!lane.num_rows || lane.row_ids[lane.num_rows - 1] != t) lane.row_ids[lane.num_rows++] = t;
        }
    }
    return true;
}

bool send_rows(Crossing& c, int64_t number, int64_t layer_id, const char* x, int64_t row_bytes, const int64_t* ids,
               const float* weights, int64_t S) {
    Lane& lane = c.lanes[number];
    const int64_t num = lane.num_rows * S, width = c.H * (c.dtype == kFloat32 ? 4 : 2);
    Frame head = new_frame(kRequest);
    head.dtype = static_cast<uint8_t>(c.dtype);
    head.request_id = ++lane.request_id;
    head.layer_id = static_cast<uint32_t>(layer_id);
    head.rows = static_cast<uint32_t>(lane.num_rows);
    head.hidden_size = static_cast<uint32_t>(c.H);
    head.topk = static_cast<uint32_t>(S);
    head.epoch = c.epoch;
    head.timeout_ms = c.timeout_ms;
    head.slot = lane.slot;
    head.payload_bytes = 8 * num;
    char* payload = c.frame + sizeof head;
    for (int64_t r = 0; r < lane.num_rows; r++) {
        const int64_t t = lane.row_ids[r];
        memcpy(lane.rows + r * width, x + t * row_bytes, width);
        memcpy(payload + (num + r * S) * 4, weights + t * S, S * 4);
        for (int64_t s = 0; s < S; s++) {
            const int64_t id = ids[t * S + s];
            const int32_t wire = id >= 0 && c.shard_of[layer_id * c.E + id] == number ? static_cast<int32_t>(id) : -1;
            memcpy(payload + (r * S + s) * 4, &wire, 4);
        }
    }
    head.sent_at = seconds(CLOCK_REALTIME);
    head.checksum = checksum(head, payload, 4 * num);
    memcpy(c.frame, &head, sizeof head);
    lane.filled = 0;
    lane.sent_at = seconds(CLOCK_MONOTONIC);
    const ssize_t size = sizeof head + 8 * num;
    const ssize_t sent = send(lane.socket, c.frame, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent > 0 && sent < size) shutdown(lane.socket, SHUT_RDWR);  // half a frame is of no use to anyone
    return sent == size;
}

// Waits for a lane's answer; false if anything else comes, or nothing by `deadline`.
bool receive(const Crossing& c, Lane& lane, double deadline) {
    char* got = reinterpret_cast<char*>(&lane.got);
    while (lane.filled < static_cast<int32_t>(sizeof lane.got)) {
        const ssize_t count = recv(lane.socket, got + lane.filled, sizeof lane.got - lane.filled, MSG_DONTWAIT);
        if (count > 0) {
            lane.filled += static_cast<int32_t>(count);
        } else if (count == 0 || (errno != EAGAIN && errno != EINTR)) {
            return false;
        } else {
            const double left = deadline - seconds(CLOCK_MONOTONIC);
            pollfd one = {lane.socket, POLLIN, 0};
            if (left <= 0 || (poll(&one, 1, static_cast<int>(left * 1000) + 1) < 0 && errno != EINTR)) return false;
        }
    }
    const Frame& head = lane.got;
    return is_frame(head, kAnswer) && head.request_id == lane.request_id && head.dtype == c.dtype &&
           head.rows == lane.num_rows && head.hidden_size == c.H && head.slot == lane.slot && !head.payload_bytes &&
           checksum(head, nullptr, 0) == head.checksum;
}

template <class Number>
void add(Crossing& c, float* sum, float (*number)(Number)) {
    for (int64_t i = 0; i < c.num_lanes; i++) {
        const Lane& lane = c.lanes[i];
        for (int64_t r = 0; r < lane.num_rows; r++) {
            const Number* from = reinterpret_cast<const Number*>(lane.rows) + r * c.H;
            float* to = sum + lane.row_ids[r] * c.H;
            for (int64_t h = 0; h < c.H; h++) to[h] += number(from[h]);
        }
    }
}

float of_bfloat16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

float of_float32(float x) { return x; }

void add_up(Crossing& c, void* out, int64_t T) {
    const int64_t num = T * c.H;
    for (int64_t i = 0; i < c.num_lanes; i++) {
        if (c.lanes[i].num_rows < T) continue;
        bool alone = true;
        for (int64_t j = 0; j < c.num_lanes; j++) alone = alone && (j == i || !c.lanes[j].num_rows);
        if (alone) return static_cast<void>(memcpy(out, c.lanes[i].rows, num * (c.dtype == kFloat32 ? 4 : 2)));
    }
    float* sum = c.dtype == kFloat32 ? static_cast<float*>(out) : c.sum;
    memset(sum, 0, num * sizeof(float));
    if (c.dtype == kFloat32) return add<float>(c, sum, of_float32);
    add<uint16_t>(c, sum, of_bfloat16);
    for (int64_t i = 0; i < num; i++) static_cast<uint16_t*>(out)[i] = rounded(sum[i]);
}

}  // namespace
}  // namespace moe

extern "C" {

// Sends each lane its rows: x [T, H] with rows of row_bytes, ids and weights [T, S], negative for no expert. Does not
// wait. Returns the lanes that are served then; the one after them, if any, and all behind it were sent nothing.
int32_t moe_send(moe::Crossing* c, int64_t layer_id, const void* x, int64_t row_bytes, const int64_t* ids,
                 const float* weights, int64_t T, int64_t S) {
    using namespace moe;
    if (layer_id >= c->num_layers || T > c->most_rows || S > c->most_slots) return -1;
    if (!choose_rows(*c, layer_id, ids, T, S)) return -1;
    for (int64_t i = 0; i < c->num_lanes; i++) {
        if (c->lanes[i].num_rows &&
            !send_rows(*c, i, layer_id, static_cast<const char*>(x), row_bytes, ids, weights, S)) {
            return static_cast<int32_t>(i);
        }
    }
    return static_cast<int32_t>(c->num_lanes);
}

// Waits for the answers of all lanes with rows, then adds them up in the lanes' order: out [T, H] of the dtype. Returns
// the lanes that have answered: the next one has not by limit_s, or has sent something else, which is in `got`.
int32_t moe_sum(moe::Crossing* c, void* out, int64_t T, double limit_s) {
    using namespace moe;
    const int64_t before = c->logged;
    for (int64_t i = 0; i < c->num_lanes; i++) {
        Lane& lane = c->lanes[i];
        if (!lane.num_rows) continue;
        const double asked = seconds(CLOCK_MONOTONIC);
        if (!receive(*c, lane, asked + limit_s)) {
            c->logged = before;
            return static_cast<int32_t>(i);
        }
        const double now = seconds(CLOCK_MONOTONIC);
        c->log[c->logged++ % c->log_size] = {i, lane.num_rows, now - lane.sent_at, now - asked};
    }
    add_up(*c, out, T);
    return static_cast<int32_t>(c->num_lanes);
}

}  // extern "C"
#endif
