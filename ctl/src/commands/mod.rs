// SPDX-License-Identifier: GPL-2.0-or-later

//! What is done at once, and ends.

pub mod doctor;
pub mod domain;
pub mod keys;
pub mod orders;
pub mod papers;
pub mod status;
pub mod top;
