//! What the tests of memory share: a process's own peak, and model folders of any size.

use std::{fs, io::Write, path::Path};

use serde_json::Value;

/// The most that this process ever had in memory, in bytes.
pub fn peak() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<usize>().ok()? * 1024)
}

/// Writes a model folder without ever holding its weights: one small pattern over and over.
pub fn write_model(folder: &Path, config: &Value, tensors: Vec<(String, Vec<usize>)>) {
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let end = at + 4 * shape.iter().product::<usize>();
        header.insert(name, serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let header = Value::Object(header).to_string().into_bytes();
    let mut file = std::io::BufWriter::new(fs::File::create(folder.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    let pattern: Vec<u8> = (0..251u32).flat_map(|i| ((i * 7919 % 251) as f32 / 2500.0 - 0.05).to_le_bytes()).collect();
    let mut left = at;
    while left > 0 {
        let count = left.min(pattern.len());
        file.write_all(&pattern[..count]).unwrap();
        left -= count;
    }
    file.flush().unwrap();
}
