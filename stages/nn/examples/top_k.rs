//! Times the exact top-k on vectors from a file, for `scripts/bench topk`.
//!
//! `top_k FILE DIM K THREADS OUT`: FILE holds rows of little-endian f32. Prints the seconds of each of three searches,
//! and writes the neighbours of the first 50 rows to OUT as JSON.

use std::{error::Error, fs, time::Instant};

use grlm_nn::nearest::top_k;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [file, dim, k, threads, out] = arguments.as_slice() else {
        return Err("usage: top_k FILE DIM K THREADS OUT".into());
    };
    let (dim, k) = (dim.parse()?, k.parse()?);
    let bytes = fs::read(file)?;
    let (values, _) = bytes.as_chunks::<4>();
    let rows: Vec<f32> = values.iter().map(|v| f32::from_le_bytes(*v)).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.parse()?).build()?;
    for run in 0..3 {
        let start = Instant::now();
        let found = pool.install(|| top_k(&rows, dim, k));
        println!("ours {:.3} s", start.elapsed().as_secs_f64());
        if run == 0 {
            let indices: Vec<Vec<u32>> =
                found.iter().take(50).map(|row| row.iter().map(|(index, _)| *index).collect()).collect();
            fs::write(out, serde_json::to_string(&indices)?)?;
        }
    }
    Ok(())
}
