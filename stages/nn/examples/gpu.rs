//! Times a random model on a GPU, for `scripts/gpu_check`.
//!
//! `gpu FOLDER [shape=0.6B|4B|tiny] [dtype=bf16|f16|f32] [device=0|cpu] [users=64] [prompt=700] [beams=20] [new=8]`
//!
//! Writes the model's weights into FOLDER (made up, of the real shape) unless they are there. Prints the bandwidth of the
//! device's memory, measured by copying; then for embedding, extraction and generation `name value`: tokens, prompts,
//! users or beams a second, and what part of that bandwidth a step of decoding uses, all weights being read once a step.

use std::{
    collections::{BTreeSet, HashMap},
    error::Error,
    fs,
    io::{BufWriter, Write},
    path::Path,
    time::Instant,
};

use candle_core::{DType, Device, Tensor};
use grlm_nn::{
    generate::{Asked, Catalogue, Generator, Normalize, Trie, greedy},
    qwen3::{Config, FloatType, Place, Qwen3, Room, Wanted},
};
use serde_json::json;

const TIDS: usize = 11_857;
const MIB: f64 = (1u64 << 20) as f64;

fn config(shape: &str) -> Result<Config, Box<dyn Error>> {
    let small = Config::default();
    match shape {
        "0.6B" => Ok(small),
        "4B" => Ok(Config { hidden_size: 2560, intermediate_size: 9728, layers: 36, heads: 32, ..small }),
        "tiny" => Ok(Config {
            vocab_size: 2000,
            hidden_size: 64,
            intermediate_size: 128,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            ..small
        }),
        other => Err(format!("no shape `{other}`: 0.6B, 4B or tiny").into()),
    }
}

/// Weights in bf16 from a short row of numbers, over and over; norms are 1.
fn write(folder: &Path, config: &Config) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join("config.json"), config.to_json("bfloat16").to_string())?;
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in config.tensors() {
        let end = at + 2 * shape.iter().product::<usize>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let header = serde_json::to_vec(&header)?;
    // The whole file only gets its name when it is whole.
    let part = folder.join("model.part");
    let mut file = BufWriter::new(fs::File::create(&part)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut noise = Noise(9);
    let row: Vec<u8> = (0..65_521).flat_map(|_| half::bf16::from_f32(0.035 * noise.float()).to_le_bytes()).collect();
    let ones = half::bf16::ONE.to_le_bytes();
    for (name, shape) in config.tensors() {
        let mut left = 2 * shape.iter().product::<usize>();
        if name.contains("norm") {
            (0..left / 2).try_for_each(|_| file.write_all(&ones))?;
            continue;
        }
        while left > 0 {
            let count = left.min(row.len());
            file.write_all(&row[..count])?;
            left -= count;
        }
    }
    file.flush()?;
    fs::rename(part, folder.join("model.safetensors"))?;
    Ok(())
}

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// In −1..1.
    fn float(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }

    fn tokens(&mut self, count: usize, vocabulary: usize) -> Vec<u32> {
        (0..count).map(|_| (self.next() % vocabulary as u64) as u32).collect()
    }
}

/// Bytes a second that a copy reads and writes.
fn bandwidth(device: &Device) -> Result<f64, candle_core::Error> {
    let bytes = if device.is_cuda() { 1usize << 30 } else { 1 << 26 };
    let from = Tensor::zeros(bytes / 4, DType::F32, device)?;
    let mut best = f64::INFINITY;
    for _ in 0..6 {
        device.synchronize()?;
        let start = Instant::now();
        let copy = from.copy()?;
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
        drop(copy);
    }
    Ok(2.0 * bytes as f64 / best)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: gpu FOLDER [name=value …]")?;
    let settings: HashMap<String, String> =
        arguments.filter_map(|a| a.split_once('=').map(|(n, v)| (n.to_owned(), v.to_owned()))).collect();
    let text = |name: &str, default: &str| settings.get(name).cloned().unwrap_or_else(|| default.to_owned());
    let number = |name: &str, default: usize| settings.get(name).map_or(Ok(default), |v| v.parse());
    let (users, prompt) = (number("users", 64)?, number("prompt", 700)?);
    let (beams, new) = (number("beams", 20)?, number("new", 8)?);
    let (dtype, bytes) = match text("dtype", "bf16").as_str() {
        "bf16" => (FloatType::Bf16, 2),
        "f16" => (FloatType::F16, 2),
        "f32" => (FloatType::F32, 4),
        other => return Err(format!("no dtype `{other}`").into()),
    };
    let (place, device) = match text("device", "0").as_str() {
        "cpu" => (Place::CpuTensors { dtype }, Device::Cpu),
        gpu => (Place::Cuda { device: gpu.parse()?, dtype }, Device::new_cuda(gpu.parse()?)?),
    };
    let config = config(&text("shape", "0.6B"))?;
    let folder = Path::new(&folder);
    if !folder.join("model.safetensors").exists() {
        write(folder, &config)?;
    }
    let start = Instant::now();
    let model = Qwen3::load_on(folder, place)?;
    device.synchronize()?;
    let parameters: usize = config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    println!("parameters {parameters}, loaded in {:.1} s", start.elapsed().as_secs_f64());
    let bandwidth = bandwidth(&device)?;
    println!("bandwidth_gb_per_s {:.0}", bandwidth / 1e9);

    let mut noise = Noise(5);
    let mut prompts =
        |length| -> Vec<Vec<u32>> { (0..users).map(|_| noise.tokens(length, config.vocab_size)).collect() };
    let (short, long) = (prompts(prompt.min(64)), prompts(prompt));
    let embed = || -> Result<f64, grlm_nn::Error> {
        let asked: Vec<&[u32]> = short.iter().map(Vec::as_slice).collect();
        let start = Instant::now();
        let mut branches = model.branches(None, Room::of(&asked, 0))?;
        model.read(&mut branches, &asked, Wanted::Last, 1)?;
        Ok(start.elapsed().as_secs_f64())
    };
    embed()?;
    println!("embed_tokens_per_s {:.0}", short.iter().map(Vec::len).sum::<usize>() as f64 / embed()?);

    let generator = Generator::new(&model, 1);
    let asked: Vec<&[u32]> = long.iter().map(Vec::as_slice).collect();
    let write = |count| -> Result<f64, grlm_nn::Error> {
        let start = Instant::now();
        greedy(&generator, &asked, count, |_| false)?;
        Ok(start.elapsed().as_secs_f64())
    };
    write(2)?;
    let (first, whole) = (write(1)?, write(17)?);
    let step = (whole - first) / 16.0;
    println!("extract_prompts_per_s {:.1}", users as f64 / whole);
    println!("extract_tokens_per_s {:.0}", (users * (prompt + 17)) as f64 / whole);
    println!("decode_part_of_bandwidth {:.3}", (parameters * bytes) as f64 / step / bandwidth);

    let mut tids = BTreeSet::new();
    while tids.len() < TIDS {
        tids.insert(noise.tokens(new, config.vocab_size));
    }
    let trie = Trie::new(&tids.into_iter().collect::<Vec<_>>())?;
    for (name, normalize) in [("full", Normalize::Full), ("allowed", Normalize::Allowed)] {
        let search = Catalogue { trie: &trie, beams, normalize, length_penalty: 0.0 };
        let asked: Vec<Asked> = long.iter().map(|tokens| Asked { tokens, left_out: &[] }).collect();
        let start = Instant::now();
        search.search(&generator, &asked)?;
        let seconds = start.elapsed().as_secs_f64();
        println!("generate_{name}_users_per_s {:.2}", users as f64 / seconds);
        println!("generate_{name}_beams_per_s {:.1}", (users * beams) as f64 / seconds);
    }
    if let Ok(out) = std::process::Command::new("nvidia-smi")
        .args(["--query-compute-apps=used_memory", "--format=csv,noheader,nounits"])
        .output()
    {
        let used: f64 = String::from_utf8_lossy(&out.stdout).lines().filter_map(|l| l.trim().parse::<f64>().ok()).sum();
        println!("memory_mib {used:.0} (weights {:.0})", (parameters * bytes) as f64 / MIB);
    }
    Ok(())
}
