{{/* Where the checkpoint comes from, and how pods get it. Without a source it is `demo`, inside the image. */}}

{{/* "true", or nothing where the values name a place. */}}
{{- define "moe-cluster.modelInImage" -}}
{{- if not .Values.model.source }}
{{- with .Values.model.name }}
{{- fail (printf "model.source is empty: where is %s? Without model.name and model.source the tiny demo model inside the image is served" .) }}
{{- end }}
{{- "true" }}
{{- end }}
{{- end }}

{{- define "moe-cluster.modelDir" -}}
{{- $name := required "model.name is missing: the name of the checkpoint's directory" .Values.model.name }}
{{- printf "%s/%s" (trimSuffix "/" .Values.model.mountPath) $name }}
{{- end }}

{{/* "true" for the two demo models, which need no GPU; else nothing. */}}
{{- define "moe-cluster.isTiny" -}}
{{- if or (include "moe-cluster.modelInImage" .) (hasKey .Values.model.source "demo") }}
{{- "true" }}
{{- end }}
{{- end }}

{{/* The argument `model`: a directory, or a name on the hub or in the package. */}}
{{- define "moe-cluster.model" -}}
{{- $hub := .Values.model.source.huggingFace }}
{{- if include "moe-cluster.modelInImage" . }}
{{- "demo" }}
{{- else if $hub }}
{{- printf "%s%s" $hub.repository (ternary (printf "@%s" $hub.revision) "" (not (empty $hub.revision))) }}
{{- else }}
{{- include "moe-cluster.modelDir" . }}
{{- end }}
{{- end }}

{{/* Variables of the hub's library, by which each process fetches its own files. */}}
{{- define "moe-cluster.hubEnv" -}}
{{- $hub := .Values.model.source.huggingFace }}
- name: HF_HOME
  value: {{ .Values.model.mountPath }}
- name: HF_HUB_DISABLE_TELEMETRY
  value: "1"
{{- with $hub.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- if $hub.tokenSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ required "model.source.huggingFace.tokenSecret.name is missing: the Secret with the token" $hub.tokenSecret.name }}
      key: {{ default "token" $hub.tokenSecret.key }}
{{- end }}
{{- end }}

{{- define "moe-cluster.modelVolume" -}}
name: model
{{- $source := .Values.model.source }}
{{- $cache := .Values.model.cache }}
{{- if hasKey $source "pvc" }}
persistentVolumeClaim:
  claimName: {{ $source.pvc.claimName }}
  readOnly: true
{{- else if and $cache.claimName $cache.hostPath }}
{{- fail "model.cache has both claimName and hostPath: set one of them" }}
{{- else if $cache.claimName }}
persistentVolumeClaim:
  claimName: {{ $cache.claimName }}
{{- else if $cache.hostPath }}
hostPath:
  path: {{ $cache.hostPath }}
  type: DirectoryOrCreate
{{- else if $cache.sizeLimit }}
emptyDir:
  sizeLimit: {{ $cache.sizeLimit }}
{{- else }}
emptyDir: {}
{{- end }}
{{- end }}

{{/* A claim has the checkpoint itself, a cache has directories of checkpoints; a hub's is written by all pods. */}}
{{- define "moe-cluster.modelMount" -}}
name: model
readOnly: {{ not (hasKey .Values.model.source "huggingFace") }}
{{- if hasKey .Values.model.source "pvc" }}
mountPath: {{ include "moe-cluster.modelDir" . }}
{{- with .Values.model.source.pvc.subPath }}
subPath: {{ . }}
{{- end }}
{{- else }}
mountPath: {{ .Values.model.mountPath }}
{{- end }}
{{- end }}

{{/* image, where (an address that names the checkpoint), command, env, secret of each source that is fetched. */}}
{{- define "moe-cluster.modelFetch" -}}
{{- $source := .Values.model.source }}
{{- if hasKey $source "objectStorage" }}
{{- $storage := $source.objectStorage }}
image: {{ default "docker.io/rclone/rclone:1.70.3" $storage.image | quote }}
where: {{ $storage.url | quote }}
command: {{ default "rclone copy --config= --transfers=8 \"$MODEL_REMOTE\" \"$MODEL_DIR.part\"" $storage.command | quote }}
secret: {{ default "" $storage.secretName | quote }}
env:
  - name: MODEL_REMOTE
    {{- $remote := ternary ":s3,provider=AWS,env_auth=true:" ":gcs,env_auth=true,bucket_policy_only=true:" (hasPrefix "s3://" $storage.url) }}
    value: {{ printf "%s%s" $remote (regexReplaceAll "^(s3|gs)://" $storage.url "") | quote }}
  {{- with $storage.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- else if hasKey $source "demo" }}
{{- $seed := int (default 0 $source.demo.seed) }}
image: {{ include "moe-cluster.image" . | quote }}
where: {{ printf "demo://%d" $seed | quote }}
command: {{ printf "rm -rf \"$MODEL_DIR.part\"; python -c 'from cluster.checkpoint.demo import write_demo_checkpoint; import os; write_demo_checkpoint(os.environ[\"MODEL_DIR\"] + \".part\", %d)'" $seed | quote }}
secret: ""
env: []
{{- end }}
{{- end }}

{{/* One pod at a time fetches into a shared cache; what bears the model's name is complete. */}}
{{- define "moe-cluster.modelInitContainer" -}}
{{- $fetch := fromYaml (include "moe-cluster.modelFetch" .) -}}
name: model
image: {{ $fetch.image }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [/bin/sh, -c]
args:
  - |
    set -eu
    exec 9> "$MODEL_DIR.lock"
    flock 9
    if [ -d "$MODEL_DIR" ]; then
      found=$(cat "$MODEL_DIR/.source")
      if [ "$found" = "$MODEL_SOURCE" ]; then
        echo "$MODEL_DIR is there"
        exit 0
      fi
      echo "$MODEL_DIR holds $found, not $MODEL_SOURCE: set another model.name or clear the cache" >&2
      exit 1
    fi
    mkdir -p "$MODEL_DIR.part"
    {{ $fetch.command }}
    printf '%s' "$MODEL_SOURCE" > "$MODEL_DIR.part/.source"
    mv "$MODEL_DIR.part" "$MODEL_DIR"
env:
  - name: HOME
    value: /tmp
  - name: MODEL_DIR
    value: {{ include "moe-cluster.modelDir" . }}
  - name: MODEL_SOURCE
    value: {{ $fetch.where | quote }}
  {{- with $fetch.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $fetch.secret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
resources:
  {{- toYaml .Values.model.download.resources | nindent 2 }}
securityContext:
  {{- toYaml .Values.securityContext.container | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  - name: model
    mountPath: {{ .Values.model.mountPath }}
{{- end }}
