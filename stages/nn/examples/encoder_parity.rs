//! Compares an encoder with transformers: `encoder_parity FOLDER TITLES EXPECTED [MAX_TOKENS] [POOLING]`, where
//! EXPECTED is what `scripts/fixtures/encoders.py expect` wrote. Prints the least cosine and the time, and fails below
//! 0.99999.

use std::{error::Error, fs, path::Path, time::Instant};

use grlm_nn::encoder::{Encoder, Pooling};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, titles, expected, more @ ..] = arguments.as_slice() else {
        return Err("usage: encoder_parity FOLDER TITLES EXPECTED [MAX_TOKENS] [mean|last|cls]".into());
    };
    let max_tokens = more.first().map_or(Ok(512), |n| n.parse())?;
    let pooling = match more.get(1).map(String::as_str) {
        None => None,
        Some("mean") => Some(Pooling::Mean),
        Some("last") => Some(Pooling::Last),
        Some("cls") => Some(Pooling::Cls),
        Some(other) => return Err(format!("unknown pooling `{other}`").into()),
    };
    let encoder = Encoder::load(Path::new(folder), pooling, max_tokens)?;
    let titles = fs::read_to_string(titles)?;
    let titles: Vec<&str> = titles.lines().collect();
    let expected = fs::read(expected)?;
    let expected: Vec<f32> = expected.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    if expected.len() != titles.len() * encoder.width() {
        return Err(
            format!("{} numbers are not {} vectors of {}", expected.len(), titles.len(), encoder.width()).into()
        );
    }
    let start = Instant::now();
    let vectors = encoder.encode(&titles, rayon::current_num_threads())?;
    let seconds = start.elapsed().as_secs_f64();
    let cosines = vectors.iter().zip(expected.chunks(encoder.width()));
    let least = cosines
        .map(|(a, b)| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>())
        .fold(f64::INFINITY, f64::min);
    println!("{} texts, {:?} pooling, {seconds:.2} s, least cosine {least:.7}", titles.len(), encoder.pooling());
    if least >= 0.99999 { Ok(()) } else { Err("the vectors differ from transformers'".into()) }
}
