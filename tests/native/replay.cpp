// Repeats recorded calls of the kernels' plain variant; tests/native_replay.py writes them, and compares.
// Usage: replay CALLS RESULTS, or replay VARIANT …, which prints those of the names that this processor runs. Needs neither Python nor torch, so that it runs where an emulator is all that there is.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

extern "C" const void* const* moe_kernels(const char* name);

namespace {

// Whole numbers and pointers go into one kind of registers and then onto the stack, floating ones into another kind: a
// function gets its arguments however both are mixed in its declaration, as long as there are at most 8 floating ones.
typedef int64_t (*Function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                            int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                            int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                            int64_t, int64_t, double, double, double, double, double, double, double, double);

int64_t number(FILE* file) {
    int64_t value;
    if (fread(&value, sizeof value, 1, file) != 1) exit(2);
    return value;
}

void repeat(FILE* calls, FILE* results, int64_t function) {
    const int64_t num_buffers = number(calls), num_pointers = number(calls), num_whole = number(calls),
                  num_floating = number(calls);
    if (num_whole > 32 || num_floating > 8) exit(3);
    std::vector<char*> buffers(num_buffers);
    std::vector<int64_t> sizes(num_buffers);
    for (int64_t i = 0; i < num_buffers; i++) {
        sizes[i] = number(calls);
        buffers[i] = static_cast<char*>(aligned_alloc(64, (sizes[i] + 64) / 64 * 64));
        if (sizes[i] && fread(buffers[i], sizes[i], 1, calls) != 1) exit(2);
    }
    const auto pointer = [&] {
        const int64_t buffer = number(calls), offset = number(calls);
        return buffer < 0 ? offset : reinterpret_cast<int64_t>(buffers[buffer] + offset);
    };
    for (int64_t i = 0; i < num_pointers; i++) {  // inside buffers
        const int64_t buffer = number(calls), offset = number(calls);
        *reinterpret_cast<int64_t*>(buffers[buffer] + offset) = pointer();
    }
    int64_t w[32] = {};
    double f[8] = {};
    for (int64_t i = 0; i < num_whole; i++) w[i] = pointer();
    for (int64_t i = 0; i < num_floating; i++) {
        if (fread(&f[i], sizeof f[i], 1, calls) != 1) exit(2);
    }
    const Function call = reinterpret_cast<Function>(const_cast<void*>(moe_kernels("plain")[function]));
    const int64_t result =
        call(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15], w[16],
             w[17], w[18], w[19], w[20], w[21], w[22], w[23], w[24], w[25], w[26], w[27], w[28], w[29], w[30], w[31],
             f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7]);
    fwrite(&result, sizeof result, 1, results);
    for (int64_t i = 0; i < num_buffers; i++) {
        fwrite(buffers[i], 1, sizes[i], results);
        free(buffers[i]);
    }
}

}  // namespace

int main(int count, char** names) {
    FILE* calls = count == 3 ? fopen(names[1], "rb") : nullptr;
    if (!calls) {
        for (int i = 1; i < count; i++) {
            if (moe_kernels(names[i])) puts(names[i]);
        }
        return 0;
    }
    FILE* results = fopen(names[2], "wb");
    if (!results) return 1;
    for (int64_t function = number(calls); function; function = number(calls)) repeat(calls, results, function);
    return fclose(results);
}
