//! The formula of `generate::memory` beside the peak of a process. Alone in its file: the peak is the process's own.

use grlm_nn::{
    generate::{Asked, Catalogue, Free, Generator, Normalize, Trie, memory},
    qwen3::{Config, Qwen3},
};

mod common;
use common::{peak, write_model};

const BATCH: usize = 12;
const PROMPT: usize = 200;
const PREFIX: usize = 40;
const BEAMS: usize = 16;
const NEW: usize = 6;

fn config() -> Config {
    Config {
        vocab_size: 24_000,
        hidden_size: 256,
        intermediate_size: 512,
        layers: 3,
        heads: 8,
        kv_heads: 8,
        head_dim: 64,
        max_positions: 512,
        rope_theta: 1e4,
        rms_norm_eps: 1e-6,
        tied: true,
        bos_token: None,
        eos_tokens: Vec::new(),
        pad_token: None,
        initializer_range: 0.02,
    }
}

#[test]
fn the_formula_is_within_a_fifth_of_the_peak() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), &config().to_json("float32"), config().tensors());
    let token = |i: usize| (i.wrapping_mul(2_654_435_761) >> 7) as u32 % 24_000;
    let prompts: Vec<Vec<u32>> = (0..BATCH).map(|p| (0..PROMPT).map(|i| token(p * PROMPT + i)).collect()).collect();
    let tids: std::collections::BTreeSet<Vec<u32>> =
        (0..1000).map(|t| (0..NEW).map(|i| token(t * NEW + i + 77)).collect()).collect();
    let trie = Trie::new(&tids.into_iter().collect::<Vec<_>>()).unwrap();
    let Some(before) = peak() else {
        eprintln!("skipped: this system does not say how much memory a process took");
        return;
    };
    let model = Qwen3::load(folder.path()).unwrap();
    let beginning: Vec<u32> = (0..PREFIX).map(token).collect();
    let generator = Generator::new(&model, 1).with_batch(BATCH).with_prefix(&beginning).unwrap();
    let asked: Vec<Asked> = prompts.iter().map(|tokens| Asked { tokens, left_out: &[] }).collect();
    let search = Catalogue { trie: &trie, beams: BEAMS, normalize: Normalize::Full, length_penalty: 0.0 };
    search.search(&generator, &asked).unwrap();
    let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let free = Free { beams: BEAMS, max_new: NEW, length_penalty: 1.0, ends: Vec::new() };
    free.search(&generator, &slices).unwrap();
    let measured = (peak().unwrap() - before) as f64;
    let load = memory::Load {
        stored: 4,
        prefix: PREFIX,
        threads: 1,
        batch: BATCH,
        longest: PROMPT,
        slots: memory::catalogue_slots(&trie, BEAMS).max(memory::free_slots(BEAMS, NEW)),
    };
    let stated = memory::peak(&config(), load) as f64;
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    println!("stated {:.1} MiB, measured {:.1} MiB", mib(stated), mib(measured));
    assert!((stated / measured - 1.0).abs() < 0.2, "stated {:.1} MiB, measured {:.1} MiB", mib(stated), mib(measured));
}
