//! `backend: llamafactory`: the data set, its description and the arguments are written, `llamafactory-cli` runs on
//! the leased GPUs, and what it wrote is handed on as the checkpoint.
//!
//! It works in the attempt's scratch folder, which later attempts of the same action find again: a run that was
//! killed goes on from LlamaFactory's last whole checkpoint. Several GPUs are one run (torchrun, by LlamaFactory).

use std::{
    fs,
    path::{Path, PathBuf},
};

use grlm_nn::{qwen3::Config, train::data::Corpus};
use serde_json::{Value, json};

use super::{data, params::Method, params::Params};
use crate::{
    StageContext, StageError,
    artifact::{CheckpointInfo, CurvePoint, checkpoint::CHECKPOINT_VERSION, jsonl},
    lm::{Layout, Sample},
};

mod progress;
mod run;
pub mod settings;
#[cfg(test)]
mod tests;

/// Trains, and writes the outputs.
///
/// # Errors
/// The model or a file is wrong; the program cannot be started, or fails; a stop was asked for.
pub fn train(
    params: &Params,
    files: &[data::File],
    layout: &Layout,
    base: &Path,
    cx: &mut StageContext,
) -> Result<(), StageError> {
    if cx.optional_input("holdout").is_some() {
        return Err(StageError::params("LlamaFactory cannot validate on held-out items")
            .help("connect `valid`, or set `validation.share`, in place of `holdout`"));
    }
    Config::load(base)?;
    let folder = Folder::new(cx.scratch())?;
    let samples = mixed(params, files);
    write_json(&folder.data.join("train.json"), &samples.iter().map(|s| alpaca(s)).collect())?;
    let valid = cx.optional_input("valid").map(Sample::read).transpose()?;
    if let Some(valid) = &valid {
        write_json(&folder.data.join("valid.json"), &valid.iter().map(alpaca).collect())?;
    }
    write_json(&folder.data.join("dataset_info.json"), &dataset_info(valid.is_some()))?;
    let deepspeed = settings::deepspeed(params.llamafactory.deepspeed);
    let deepspeed_file = folder.root.join("deepspeed.json");
    if let Some(settings) = &deepspeed {
        write_json(&deepspeed_file, settings)?;
    }

    let devices = cx.devices().len().max(1);
    let global = params.batch * params.accumulation * devices;
    cx.info(format!("{} samples, {global} of them a step on {devices} device(s)", samples.len()));
    let resume = last_checkpoint(&folder.output);
    if let Some(checkpoint) = &resume {
        cx.info(format!("going on from {}", checkpoint.display()));
    }
    let template = layout.settings().template;
    let text = |path: &Path| path.display().to_string();
    let (model, resume) = (absolute(base)?, resume.as_deref().map(text));
    let deepspeed = deepspeed.map(|_| text(&deepspeed_file));
    let places = settings::Places {
        model: &text(&model),
        data: &text(&folder.data),
        output: &text(&folder.output),
        deepspeed: deepspeed.as_deref(),
        resume: resume.as_deref(),
        valid: valid.is_some(),
    };
    let epoch_steps = samples.len().div_ceil(global) as u64;
    let arguments = settings::training(params, template, &places, epoch_steps);
    let log = folder.output.join("trainer_log.jsonl");
    run::run(params, "train", &write_yaml(&folder.root.join("train.yaml"), &arguments)?, &log, cx)?;

    let result = match params.method {
        Method::Lora => {
            let merged = folder.root.join("merged");
            let _ = fs::remove_dir_all(&merged);
            let arguments = settings::export(&text(&model), &text(&folder.output), template, &text(&merged));
            run::run(params, "export", &write_yaml(&folder.root.join("export.yaml"), &arguments)?, &log, cx)?;
            merged
        }
        _ => folder.output.clone(),
    };
    let points = progress::read(&log)?;
    let curve = points.iter().map(progress::Line::point).collect::<Vec<CurvePoint>>();
    jsonl::write(cx.output("curve")?, &curve)?;
    hand_on(&result, cx.output("checkpoint")?)?;
    describe(params, layout, &samples, &curve, cx.output("checkpoint")?)
}

/// Where a run works.
struct Folder {
    root: PathBuf,
    data: PathBuf,
    output: PathBuf,
}

impl Folder {
    fn new(scratch: &Path) -> Result<Self, StageError> {
        let root = absolute(scratch)?.join("llamafactory");
        let folder = Self { data: root.join("data"), output: root.join("output"), root };
        for path in [&folder.data, &folder.output] {
            fs::create_dir_all(path).map_err(|e| StageError::io("create", path, e))?;
        }
        Ok(folder)
    }
}

fn absolute(path: &Path) -> Result<PathBuf, StageError> {
    std::path::absolute(path).map_err(|e| StageError::io("find", path, e))
}

/// All samples, as often as their weights say. Unlike this program, LlamaFactory takes the same ones every epoch.
fn mixed<'a>(params: &Params, files: &'a [data::File]) -> Vec<&'a Sample> {
    let empty = |count: usize| vec![grlm_nn::train::Sample { tokens: Vec::new(), learned_from: 1 }; count];
    let sources = files.iter().map(|f| grlm_nn::train::Source { samples: empty(f.samples.len()), weight: f.weight });
    let corpus = Corpus { sources: sources.collect() };
    let order = corpus.order(params.seed, 0);
    order.into_iter().map(|(file, sample)| &files[file as usize].samples[sample as usize]).collect()
}

fn alpaca(sample: &Sample) -> Value {
    json!({"instruction": sample.instruction, "input": sample.input, "output": sample.output})
}

fn dataset_info(valid: bool) -> Value {
    let entry = |file: &str| json!({"file_name": file, "columns": {"prompt": "instruction", "query": "input", "response": "output"}});
    let mut info = json!({settings::TRAIN_SET: entry("train.json")});
    if valid {
        info[settings::VALID_SET] = entry("valid.json");
    }
    info
}

fn write_json(path: &Path, value: &Value) -> Result<(), StageError> {
    let text = serde_json::to_string_pretty(value).map_err(|e| StageError::bug(e.to_string()))?;
    fs::write(path, text).map_err(|e| StageError::io("write", path, e))
}

fn write_yaml(path: &Path, arguments: &serde_json::Map<String, Value>) -> Result<PathBuf, StageError> {
    fs::write(path, settings::yaml(arguments)).map_err(|e| StageError::io("write", path, e))?;
    Ok(path.to_owned())
}

/// The newest checkpoint that is whole: the trainer writes its state last.
fn last_checkpoint(output: &Path) -> Option<PathBuf> {
    let number = |path: &Path| path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse::<u64>().ok();
    let folders = fs::read_dir(output).ok()?.flatten().map(|entry| entry.path());
    folders.filter(|p| number(p).is_some() && p.join("trainer_state.json").exists()).max_by_key(|p| number(p))
}

/// Files of a model folder that are handed on; optimiser states and logs are not.
fn belongs(name: &str) -> bool {
    let weights = name.starts_with("model") && (name.ends_with(".safetensors") || name.ends_with(".index.json"));
    let tokens = ["tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template"];
    weights || matches!(name, "config.json" | "generation_config.json") || tokens.iter().any(|t| name.starts_with(t))
}

/// Moves (or copies, to another file system) the model into the output.
fn hand_on(from: &Path, to: &Path) -> Result<(), StageError> {
    fs::create_dir_all(to).map_err(|e| StageError::io("create", to, e))?;
    let entries = fs::read_dir(from).map_err(|e| StageError::io("list", from, e))?;
    for path in entries.flatten().map(|e| e.path()).filter(|p| p.is_file()) {
        let Some(name) = path.file_name().and_then(|n| n.to_str()).filter(|n| belongs(n)) else { continue };
        let target = to.join(name);
        if fs::rename(&path, &target).is_err() {
            fs::copy(&path, &target).map_err(|e| StageError::io("copy", &path, e))?;
        }
    }
    for name in ["config.json", "tokenizer.json"] {
        if !to.join(name).exists() {
            return Err(StageError::Command {
                message: format!("llamafactory-cli ended without an error and wrote no {name}"),
                help: Some("see the stage's log".into()),
            });
        }
    }
    Ok(())
}

/// Writes `grlm.json`.
fn describe(
    params: &Params,
    layout: &Layout,
    samples: &[&Sample],
    curve: &[CurvePoint],
    folder: &Path,
) -> Result<(), StageError> {
    let settings = layout.settings();
    let mut facts = serde_json::Map::new();
    facts.insert("backend".into(), "llamafactory".into());
    facts.insert("samples".into(), samples.len().into());
    facts.insert("seed".into(), params.seed.into());
    if let Some(last) = curve.last() {
        facts.insert("steps".into(), last.step.into());
        facts.insert("epochs".into(), json!(last.epoch));
    }
    if let Some(loss) = curve.iter().rev().find_map(|p| p.loss) {
        facts.insert("loss".into(), json!(loss));
    }
    CheckpointInfo {
        version: CHECKPOINT_VERSION,
        format: settings.format,
        tokens: settings.tokens,
        template: settings.template,
        bos: None,
        instruction: settings.instruction.clone(),
        max_length: settings.max_length,
        method: params.method.name().into(),
        trained_from: facts,
    }
    .write(folder)
}
