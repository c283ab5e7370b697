//! Times greedy answers to prompts, for `scripts/bench extract`.
//!
//! `extract FOLDER PROMPTS NEW THREADS`: PROMPTS is a JSON array of texts, which are taken as they are. Writes exactly NEW
//! tokens after each; what all prompts begin with is computed once, inside the time that is told. Prints the seconds
//! of each of three runs, and then the tokens of the first prompts.

use std::{error::Error, fs, path::Path, time::Instant};

use grlm_nn::{
    chat::shared_beginning,
    generate::{Generator, greedy},
    qwen3::Qwen3,
};
use tokenizers::Tokenizer;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, prompts, new, threads] = arguments.as_slice() else {
        return Err("usage: extract FOLDER PROMPTS NEW THREADS".into());
    };
    let (new, threads): (usize, usize) = (new.parse()?, threads.parse()?);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let model = pool.install(|| Qwen3::load(Path::new(folder)))?;
    let tokenizer = Tokenizer::from_file(Path::new(folder).join("tokenizer.json")).map_err(|e| e.to_string())?;
    let texts: Vec<String> = serde_json::from_str(&fs::read_to_string(prompts)?)?;
    for run in 0..3 {
        let start = Instant::now();
        let (shared, answers) = pool
            .install(|| -> Result<_, Box<dyn Error + Send + Sync>> {
                let encode = |text: &String| tokenizer.encode_fast(text.as_str(), false).map(|e| e.get_ids().to_vec());
                let tokens: Vec<Vec<u32>> = texts.iter().map(encode).collect::<Result<_, _>>()?;
                let shared = shared_beginning(&tokens);
                let rest: Vec<&[u32]> = tokens.iter().map(|t| &t[shared..]).collect();
                let generator = Generator::new(&model, threads).with_prefix(&tokens[0][..shared])?;
                Ok((shared, greedy(&generator, &rest, new, |_| false)?))
            })
            .map_err(|e| e.to_string())?;
        let seconds = start.elapsed().as_secs_f64();
        println!("ours {seconds:.3} s, {:.1} ms/prompt, {shared} tokens shared", seconds * 1e3 / texts.len() as f64);
        if run == 2 {
            println!("tokens {}", serde_json::to_string(&answers.iter().take(8).collect::<Vec<_>>())?);
        }
    }
    Ok(())
}
