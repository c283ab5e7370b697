//! Qwen3: the configuration that training and generation share, and the CPU inference engine.

pub mod config;

pub use config::Config;
