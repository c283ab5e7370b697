//! Tests that drive the real program: processes, signals, the command line. Logic is tested where it lives.

mod worker;
