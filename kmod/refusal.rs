// SPDX-License-Identifier: GPL-2.0

//! Why a request was refused: an error number, and a sentence for whoever asked.

use crate::abi::netlink::Text;
use kernel::{
    alloc::AllocError,
    prelude::*, //
};

/// A refusal. Whoever returns one has changed nothing.
pub(crate) struct Refusal {
    /// For programs.
    pub(crate) error: Error,
    /// For people; empty if the error number says it all.
    pub(crate) text: Text,
}

/// Makes a [`Refusal`] from an error number and a format.
macro_rules! refusal {
    ($error:expr, $($format:tt)*) => {
        $crate::refusal::Refusal {
            error: $error,
            text: $crate::abi::netlink::Text::new(::core::format_args!($($format)*)),
        }
    };
}
pub(crate) use refusal;

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        refusal!(error, "")
    }
}

impl From<AllocError> for Refusal {
    fn from(_: AllocError) -> Self {
        refusal!(ENOMEM, "the kernel has no memory left for this")
    }
}
