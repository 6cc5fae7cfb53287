//! What a file or a request can cause, as it crosses the C ABI.

/// Matches `lst_status` in lockstep_text.h; 0 is success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    InvalidArgument = 1,
    Format = 2,
    Unsupported = 3,
    Internal = 4,
}

/// A message `[where] rule: expected ..., got ...` and its kind.
#[derive(Debug)]
pub struct Error {
    pub code: Code,
    pub message: String,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn argument(message: impl Into<String>) -> Self {
        Self { code: Code::InvalidArgument, message: message.into() }
    }

    pub fn format(message: impl Into<String>) -> Self {
        Self { code: Code::Format, message: message.into() }
    }

    pub fn unsupported(message: impl Into<String>) -> Self {
        Self { code: Code::Unsupported, message: message.into() }
    }
}
