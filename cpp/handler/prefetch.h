// Keys whose words come to the host before the call that needs them.
//
// NOTE [Prefetch]. A call that draws from a key seeds PyTorch's generators on the host, so the host
// has to see the key's words. A custom call right after the key's derivation copies them to pinned
// memory and records an event. The call that draws waits for that event, and not for all that has
// been queued since. Both have the number of the prefetch in the program, its site. In one
// execution a site may run several times (in a loop). As each call takes the words of one prefetch,
// which came before it, a call may take words where exactly one pair of them is there. Where more
// are there once, no call of that site in that execution may. Nothing says when an execution ends,
// and its number may come again. So words that nobody takes stay, and where there are too many of
// them, no call takes any.

#ifndef CPP_HANDLER_PREFETCH_H_
#define CPP_HANDLER_PREFETCH_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace bridge {

// The custom call: words -> the same words. Its attribute is "site"; with site 0 nothing is
// prefetched, and XLA's stream is noted alone. It needs no GIL.
XLA_FFI_Error* PrefetchHandler(XLA_FFI_CallFrame* call_frame);

// Takes the words of the key at `address`, and waits for them. Returns false where they were not
// prefetched, or nobody knows which prefetch they are of. `error` says what went wrong, if
// anything.
bool TakeKey(int64_t run_id, int32_t device, int64_t site, const void* address,
             std::vector<uint32_t>* words, std::string* error);

}  // namespace bridge

#endif  // CPP_HANDLER_PREFETCH_H_
