//! Times decoding on a model folder, for `scripts/bench beam`.
//!
//! `beam FOLDER [users=32] [prompt=64] [beams=20] [new=8] [threads=2] [tids=11857] [batch=8] [only=free,full,allowed,decode]`
//!
//! Prints `name milliseconds`: a user in unconstrained and constrained search, and a token of a single greedy row.

use std::{collections::HashMap, error::Error, path::Path, time::Instant};

use grlm_nn::{
    generate::{Asked, Catalogue, Free, Generator, Normalize, Trie, greedy},
    qwen3::Qwen3,
};

/// The settings of `grlm` itself.
fn tune_allocator() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` only sets parameters of the allocator; called before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}

/// Decodes some prompts.
type Work<'w> = dyn Fn(&[&[u32]]) -> Result<(), grlm_nn::Error> + 'w;

struct Noise(u64);

impl Noise {
    fn token(&mut self, vocabulary: usize) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        3 + ((self.0 >> 33) % (vocabulary as u64 - 3)) as u32
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    tune_allocator();
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: beam FOLDER [name=value …]")?;
    let settings: HashMap<String, String> =
        arguments.filter_map(|a| a.split_once('=').map(|(n, v)| (n.to_owned(), v.to_owned()))).collect();
    let number = |name: &str, default: usize| settings.get(name).map_or(Ok(default), |v| v.parse());
    let (users, prompt, beams) = (number("users", 32)?, number("prompt", 64)?, number("beams", 20)?);
    let (new, threads, tids) = (number("new", 8)?, number("threads", 2)?, number("tids", 11_857)?);
    let batch = number("batch", 8)?;
    let wanted = |name: &str| settings.get("only").is_none_or(|only| only.split(',').any(|o| o == name));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let model = pool.install(|| Qwen3::load(Path::new(&folder)))?;
    let vocabulary = model.config().vocab_size;
    let mut noise = Noise(5);
    let prompts: Vec<Vec<u32>> = (0..users).map(|_| (0..prompt).map(|_| noise.token(vocabulary)).collect()).collect();
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let mut distinct = std::collections::BTreeSet::new();
    while distinct.len() < tids {
        distinct.insert((0..new).map(|_| noise.token(vocabulary)).collect::<Vec<u32>>());
    }
    let trie = Trie::new(&distinct.into_iter().collect::<Vec<_>>())?;
    let generator = Generator::new(&model, threads).with_batch(batch);

    pool.install(|| -> Result<(), grlm_nn::Error> {
        let time = |name: &str, work: &Work| {
            if wanted(name) {
                work(&prompts[..threads.min(prompts.len())])?;
                let start = Instant::now();
                work(&prompts)?;
                println!("{name} {:.3}", start.elapsed().as_secs_f64() * 1e3 / users as f64);
            }
            Ok::<(), grlm_nn::Error>(())
        };
        let free = Free { beams, max_new: new, length_penalty: 1.0, ends: Vec::new() };
        time("free", &|prompts| free.search(&generator, prompts).map(drop))?;
        for (name, normalize) in [("full", Normalize::Full), ("allowed", Normalize::Allowed)] {
            let search = Catalogue { trie: &trie, beams, normalize, length_penalty: 0.0 };
            time(name, &|prompts| {
                let asked: Vec<Asked> = prompts.iter().map(|tokens| Asked { tokens, left_out: &[] }).collect();
                let found = search.search(&generator, &asked)?;
                assert!(found.iter().all(|f| f.len() == beams.min(tids)));
                Ok(())
            })?;
        }
        if wanted("decode") {
            let row = |tokens| greedy(&generator, &prompts[..1], tokens, |_| false);
            row(8)?;
            let (short, long) = (1, 65);
            let seconds = |tokens| {
                let start = Instant::now();
                row(tokens).map(|_| start.elapsed().as_secs_f64())
            };
            let mut each: Vec<f64> = Vec::new();
            for _ in 0..5 {
                each.push((seconds(long)? - seconds(short)?) / (long - short) as f64);
            }
            each.sort_by(f64::total_cmp);
            println!("decode {:.3}", each[2] * 1e3);
        }
        Ok(())
    })?;
    Ok(())
}
