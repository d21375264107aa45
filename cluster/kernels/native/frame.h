// The head of a frame between an engine and a shard: cluster/stream/frames.py, which defines it and tells its fields.
#pragma once

#if defined(__linux__)
#include <stdint.h>
#include <string.h>
#include <time.h>

namespace moe {

constexpr uint16_t kFrameVersion = 2;
constexpr uint8_t kRequest = 1, kAnswer = 2;
constexpr uint32_t kNoTimeout = 0xffffffff;

struct __attribute__((packed)) Frame {
    char magic[4];
    uint16_t version;
    uint8_t kind, dtype;
    uint64_t request_id;
    uint32_t layer_id, rows, hidden_size, topk;
    uint64_t epoch;
    uint32_t timeout_ms, slot;
    double sent_at;
    uint64_t payload_bytes;
    uint32_t checksum;
};
static_assert(sizeof(Frame) == 68, "as the head in frames.py");

struct CrcTable {
    uint32_t values[256];
    constexpr CrcTable() : values() {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int bit = 0; bit < 8; bit++) c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
            values[i] = c;
        }
    }
};

// zlib.crc32(data, crc)
inline uint32_t crc32(const void* data, int64_t num_bytes, uint32_t crc) {
    static constexpr CrcTable table;
    const uint8_t* p = static_cast<const uint8_t*>(data);
    crc = ~crc;
    for (int64_t i = 0; i < num_bytes; i++) crc = table.values[(crc ^ p[i]) & 255] ^ (crc >> 8);
    return ~crc;
}

// A payload's part: of a large one only the words' exclusive or, and what is left of it.
inline uint32_t add_part(const void* data, int64_t num_bytes, uint32_t crc) {
    const char* p = static_cast<const char*>(data);
    if (num_bytes > 4096) {
        uint64_t folded = 0;
        const int64_t whole = num_bytes / 8 * 8;
        for (int64_t i = 0; i < whole; i += 8) {
            uint64_t word;
            memcpy(&word, p + i, 8);
            folded ^= word;
        }
        crc = crc32(&folded, 8, crc);
        p += whole;
        num_bytes -= whole;
    }
    return crc32(p, num_bytes, crc);
}

// Of a frame whose payload is nothing, or ids and weights of `part_bytes` each.
inline uint32_t checksum(Frame head, const void* payload, int64_t part_bytes) {
    head.checksum = 0;
    uint32_t crc = crc32(&head, sizeof head, 0);
    if (!part_bytes) return crc;
    crc = add_part(payload, part_bytes, crc);
    return add_part(static_cast<const char*>(payload) + part_bytes, part_bytes, crc);
}

inline Frame new_frame(uint8_t kind) {
    Frame head = {};
    memcpy(head.magic, "moeX", 4);
    head.version = kFrameVersion;
    head.kind = kind;
    head.timeout_ms = kNoTimeout;
    return head;
}

inline bool is_frame(const Frame& head, uint8_t kind) {
    return !memcmp(head.magic, "moeX", 4) && head.version == kFrameVersion && head.kind == kind;
}

inline double seconds(clockid_t clock) {
    timespec now;
    clock_gettime(clock, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// float32 as bfloat16, to the nearest, as torch rounds.
inline uint16_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace moe
#endif
