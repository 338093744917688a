//! Tests of the NAT.
