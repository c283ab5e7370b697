//! What the tests of generation's memory share.

use std::path::Path;

use grlm_nn::{
    generate::{Asked, Catalogue, Free, Generator, Normalize, Trie, memory},
    qwen3::{Config, Place, Qwen3},
};

use crate::common::{peak, write_model};

pub const BATCH: usize = 12;
pub const PROMPT: usize = 200;
pub const PREFIX: usize = 40;
pub const BEAMS: usize = 16;
const NEW: usize = 6;

pub fn config() -> Config {
    Config {
        vocab_size: 24_000,
        hidden_size: 256,
        intermediate_size: 512,
        layers: 3,
        heads: 8,
        kv_heads: 8,
        head_dim: 64,
        max_positions: 512,
        ..Config::default()
    }
}

/// Generates in `place`, for one batch of prompts behind a beginning; what is `stated` for so many slots a prompt must be
/// within a fifth of what the process then took.
pub fn assert_formula(folder: &Path, place: Place, stated: impl Fn(usize) -> usize) {
    write_model(folder, &config().to_json("float32"), config().tensors());
    let token = |i: usize| (i.wrapping_mul(2_654_435_761) >> 7) as u32 % 24_000;
    let prompts: Vec<Vec<u32>> = (0..BATCH).map(|p| (0..PROMPT).map(|i| token(p * PROMPT + i)).collect()).collect();
    let tids: std::collections::BTreeSet<Vec<u32>> =
        (0..1000).map(|t| (0..NEW).map(|i| token(t * NEW + i + 77)).collect()).collect();
    let trie = Trie::new(&tids.into_iter().collect::<Vec<_>>()).unwrap();
    let Some(before) = peak() else {
        eprintln!("skipped: this system does not say how much memory a process took");
        return;
    };
    let model = Qwen3::load_on(folder, place).unwrap();
    let beginning: Vec<u32> = (0..PREFIX).map(token).collect();
    let generator = Generator::new(&model, 1).with_batch(BATCH).with_prefix(&beginning).unwrap();
    let asked: Vec<Asked> = prompts.iter().map(|tokens| Asked { tokens, left_out: &[] }).collect();
    let search = Catalogue { trie: &trie, beams: BEAMS, normalize: Normalize::Full, length_penalty: 0.0 };
    search.search(&generator, &asked).unwrap();
    let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let free = Free { beams: BEAMS, max_new: NEW, length_penalty: 1.0, ends: Vec::new() };
    free.search(&generator, &slices).unwrap();
    let measured = (peak().unwrap() - before) as f64;
    let slots = memory::catalogue_slots(&trie, BEAMS).max(memory::free_slots(BEAMS, NEW));
    let stated = stated(slots) as f64;
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    println!("stated {:.1} MiB, measured {:.1} MiB", mib(stated), mib(measured));
    assert!((stated / measured - 1.0).abs() < 0.2, "stated {:.1} MiB, measured {:.1} MiB", mib(stated), mib(measured));
}
