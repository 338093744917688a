//! Tests of whole plans: what each kernel format becomes, and what damaged files become.

mod compression;
mod damage;
mod formats;
