#include "verdict.h"

#include <cstdio>

#include "errors.h"
#include "lockstep/divergence.h"
#include "lockstep/error.h"
#include "lockstep/hub.h"

namespace lockstep::cli {
namespace {

bool loads(const std::string& model) {
  try {
    open_model(resolve_model(model));
    return true;
  } catch (const Error&) {
    return false;
  }
}

}  // namespace

void to_the_end(const std::function<void()>& run) {
  try {
    run();
  } catch (const CLI::Error&) {
    if (!finish_output()) throw CLI::RuntimeError(kUsage);
    throw;
  }
  if (!finish_output()) throw CLI::RuntimeError(kUsage);
}

void or_inconclusive(const std::function<void()>& run, const ModelFlags* flags) {
  try {
    to_the_end(run);
  } catch (const Error& error) {
    print_error(error.what());
    const bool usage = error.code() == ErrorCode::not_found || error.code() == ErrorCode::invalid_argument ||
                       error.code() == ErrorCode::io || (flags != nullptr && !loads(flags->model));
    throw CLI::RuntimeError(usage ? kUsage : kInconclusive);
  } catch (const CLI::Error&) {
    throw;
  } catch (const std::exception& error) {
    print_error(error.what());
    throw CLI::RuntimeError(kInconclusive);
  }
}

void or_usage(const std::function<void()>& run) {
  try {
    to_the_end(run);
  } catch (const Error& error) {
    print_error(error.what());
    throw CLI::RuntimeError(kUsage);
  }
}

void declare_inject(CLI::App& verb, std::string& fault, const std::string& description) {
  const auto list = [](const std::string& text) {
    if (text != "list") return;
    to_the_end([] {
      for (const Fault& each : faults()) {
        std::printf("%-28s %2d  %-14s %s\n", each.name.c_str(), each.kind, each.site.c_str(),
                    each.summary.c_str());
      }
    });
    throw CLI::Success();
  };
  verb.add_option("--inject", fault, description)->type_name("FAULT")->each(list);
}

}  // namespace lockstep::cli
