//! `backend: llamafactory`: the data set, its description and the arguments are written, `llamafactory-cli` runs on
//! the leased GPUs, and what it wrote is handed on as the checkpoint.
//!
//! It works in the attempt's scratch folder, which later attempts of the same action find again: a run that was
//! killed goes on from LlamaFactory's last whole checkpoint. Several GPUs are one run (torchrun, by LlamaFactory).

use std::{
    fs,
    path::{Path, PathBuf},
};

use grlm_nn::qwen3::Config;
use serde_json::{Value, json};

use super::{data, params::Method, params::Params};
use crate::{
    StageContext, StageError,
    artifact::{CheckpointInfo, CurvePoint, checkpoint::CHECKPOINT_VERSION, jsonl},
    lm::Layout,
    threads,
};

mod dataset;
mod fit;
mod progress;
mod run;
pub mod settings;
#[cfg(test)]
mod tests;

use dataset::Dataset;

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
    let template = settings::template(layout.settings())?;
    Config::load(base)?;
    let folder = Folder::new(cx.scratch())?;
    let dataset = threads::pool(cx)?.install(|| Dataset::new(params, files, layout, cx))?;
    dataset.write(&folder.data, cx)?;

    let model = text(&absolute(base)?);
    let log = folder.output.join("trainer_log.jsonl");
    let arguments = arguments(params, template, &model, &folder, &dataset, cx)?;
    run::run(params, "train", &arguments, Some(progress::Watch::new(&log)), cx)?;
    let points = progress::read(&log)?;
    let curve = points.iter().map(progress::Line::point).collect::<Vec<CurvePoint>>();

    let result = match params.method {
        Method::Lora => {
            let merged = folder.root.join("merged");
            let _ = fs::remove_dir_all(&merged);
            let arguments = settings::export(&model, &text(&folder.output), template, &text(&merged));
            run::run(params, "export", &write_yaml(&folder.root.join("export.yaml"), &arguments)?, None, cx)?;
            merged
        }
        _ => folder.output.clone(),
    };
    jsonl::write(cx.output("curve")?, &curve)?;
    hand_on(&result, cx.output("checkpoint")?)?;
    describe(params, layout, &dataset, &curve, cx.output("checkpoint")?)
}

/// Writes the arguments of `llamafactory-cli train`, and what they name.
fn arguments(
    params: &Params,
    template: &str,
    model: &str,
    folder: &Folder,
    dataset: &Dataset,
    cx: &mut StageContext,
) -> Result<PathBuf, StageError> {
    let deepspeed = settings::deepspeed(params.llamafactory.deepspeed);
    let deepspeed_file = folder.root.join("deepspeed.json");
    if let Some(settings) = &deepspeed {
        write_json(&deepspeed_file, settings)?;
    }
    let devices = cx.devices().len().max(1);
    let global = params.batch * params.accumulation * devices;
    let samples = dataset.epoch_len();
    cx.info(format!("{samples} samples an epoch, {global} of them a step on {devices} device(s)"));
    let epoch_steps = samples.div_ceil(global) as u64;
    let looks_every = settings::validation_steps(params, epoch_steps);
    if dataset.validates() && looks_every > params.save_every {
        cx.warn(format!(
            "saves when it looks at validation, every {looks_every} steps, and not every {}: set `validation.every`",
            params.save_every
        ));
    }
    let resume = resume(folder, cx)?;
    let deepspeed = deepspeed.map(|_| text(&deepspeed_file));
    let places = settings::Places {
        model,
        data: &text(&folder.data),
        output: &text(&folder.output),
        deepspeed: deepspeed.as_deref(),
        resume: resume.as_deref(),
        valid: dataset.validates(),
    };
    write_yaml(&folder.root.join("train.yaml"), &settings::training(params, template, &places, epoch_steps))
}

/// The checkpoint to go on from, if there is one; the log is taken back to it.
fn resume(folder: &Folder, cx: &mut StageContext) -> Result<Option<String>, StageError> {
    let last = last_checkpoint(&folder.output);
    let step = last.as_ref().map_or(0, |(step, _)| *step);
    progress::rewind(&folder.output.join("trainer_log.jsonl"), step)?;
    Ok(last.map(|(_, checkpoint)| {
        cx.info(format!("going on from {}", checkpoint.display()));
        text(&checkpoint)
    }))
}

fn text(path: &Path) -> String {
    path.display().to_string()
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

fn write_json(path: &Path, value: &Value) -> Result<(), StageError> {
    let text = serde_json::to_string_pretty(value).map_err(|e| StageError::bug(e.to_string()))?;
    fs::write(path, text).map_err(|e| StageError::io("write", path, e))
}

fn write_yaml(path: &Path, arguments: &serde_json::Map<String, Value>) -> Result<PathBuf, StageError> {
    fs::write(path, settings::yaml(arguments)).map_err(|e| StageError::io("write", path, e))?;
    Ok(path.to_owned())
}

/// The newest checkpoint that is whole, and its step: the trainer writes its state last.
fn last_checkpoint(output: &Path) -> Option<(u64, PathBuf)> {
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse::<u64>().ok();
    let folders = fs::read_dir(output).ok()?.flatten().map(|entry| entry.path());
    let whole = folders.filter(|path| path.join("trainer_state.json").exists());
    whole.filter_map(|path| Some((step(&path)?, path))).max_by_key(|(step, _)| *step)
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
    dataset: &Dataset,
    curve: &[CurvePoint],
    folder: &Path,
) -> Result<(), StageError> {
    let settings = layout.settings();
    let counts = dataset.counts.facts().into_iter();
    let mut facts: serde_json::Map<String, Value> = counts.map(|(k, v)| (k.to_owned(), v.into())).collect();
    facts.insert("backend".into(), "llamafactory".into());
    facts.insert("samples_an_epoch".into(), dataset.epoch_len().into());
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
