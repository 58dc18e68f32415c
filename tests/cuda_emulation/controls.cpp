// What tests of the emulated library set and read, beside its own C interface.
#include "options.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulation_configure(uint64_t seed, int detect_races, int capability) {
  emulation::options.seed = seed;
  emulation::options.detect_races = detect_races != 0;
  emulation::options.capability = capability;
  emulation::statistics = {};
}

EXPORT long emulation_products(void) { return emulation::statistics.mma; }
EXPORT long emulation_group_products(void) { return emulation::statistics.wgmma; }
EXPORT long emulation_bank_conflicts(void) { return emulation::statistics.bank_conflicts; }
