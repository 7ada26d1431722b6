// The sanitizer build: collects what the sanitizers report, so that the launch ends with it as a defect.
#include <sanitizer/asan_interface.h>

#include <utility>

#include "runtime.h"

namespace cuda_on_cpu {

// Filled by the sanitizers while a kernel runs; the scheduler takes it when the thread stops.
static std::string report;
static void keep(const char* text) {
  if (report.empty()) report = text;
}

std::string take_sanitizer_report() {
  __asan_set_error_report_callback(&keep);
  return std::exchange(report, {});
}

}  // namespace cuda_on_cpu

extern "C" {
const char* __asan_default_options() {
  return "detect_leaks=0:halt_on_error=0:suppress_equal_pcs=0:verify_asan_link_order=0:detect_stack_use_after_return=0:"
         "use_sigaltstack=0:disable_coredump=0:handle_segv=0:handle_abort=0:handle_sigfpe=0:handle_sigbus=0:handle_"
         "sigill=0";
}
const char* __ubsan_default_options() { return "print_stacktrace=0:halt_on_error=0"; }

void __ubsan_get_current_report_data(const char** kind, const char** message, const char** file, unsigned* line,
                                     unsigned* column, char** address);
void __ubsan_on_report() {
  const char *kind = "", *message = "", *file = "";
  unsigned line = 0, column = 0;
  char* address = nullptr;
  __ubsan_get_current_report_data(&kind, &message, &file, &line, &column, &address);
  const std::string text = std::string("undefined behaviour: ") + message + " at " + file + ":" + std::to_string(line);
  cuda_on_cpu::keep(text.c_str());
}
}
