// What GCC calls for "omp parallel" and a static "omp for", on std::thread instead of libgomp's pool.
// ThreadSanitizer sees std::thread start and end, but not libgomp's futexes: with libgomp, whatever
// one region writes and the next one reads would be a race.
#include <thread>
#include <vector>

namespace {

thread_local int this_thread = 0;
thread_local int threads_of_region = 1;

}  // namespace

extern "C" {

int omp_get_thread_num() { return this_thread; }
int omp_get_num_threads() { return threads_of_region; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned) {
  const auto run = [=](unsigned thread) {
    this_thread = static_cast<int>(thread);
    threads_of_region = static_cast<int>(num_threads);
    body(data);
    threads_of_region = 1;
  };
  std::vector<std::thread> others;
  for (unsigned thread = 1; thread < num_threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
}

}  // extern "C"
