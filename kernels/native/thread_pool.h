// Threads that outlive a call.

#ifndef GRAPHPRUNE_THREAD_POOL_H
#define GRAPHPRUNE_THREAD_POOL_H

namespace graphprune {

using Part = void (*)(void* argument, int part);

// Calls work(argument, part) for part = 0 .. parts - 1, each once, and returns after the last.
//
// Part 0 runs on the calling thread. While another thread is in here, or if no thread can be had,
// all of them do, in order.
void run_parts(int parts, Part work, void* argument);

}  // namespace graphprune
#endif
