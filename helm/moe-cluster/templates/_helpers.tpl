{{/* Names, labels, the image. */}}

{{/* KubeRay adds 16 characters to the name for its clusters and their services. */}}
{{- define "moe-cluster.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $full := printf "%s-%s" .Release.Name $name }}
{{- if contains $name .Release.Name }}
{{- $full = .Release.Name }}
{{- end }}
{{- $full = default $full .Values.fullnameOverride }}
{{- if gt (len $full) 47 }}
{{- fail (printf "the name %q has %d characters, KubeRay takes 47: set fullnameOverride" $full (len $full)) }}
{{- end }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) }}
{{- fail (printf "the name %q must begin with a letter and have only letters, digits and dashes: set fullnameOverride" $full) }}
{{- end }}
{{- $full }}
{{- end }}

{{/* Not app.kubernetes.io/name: KubeRay selects its head pods by its own value of that. */}}
{{- define "moe-cluster.selector" -}}
app.kubernetes.io/part-of: moe-cluster
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "moe-cluster.labels" -}}
{{ include "moe-cluster.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "moe-cluster.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{- define "moe-cluster.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "moe-cluster.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "moe-cluster.apiKeysSecret" -}}
{{- default (printf "%s-api-keys" (include "moe-cluster.fullname" .)) .Values.apiKeys.existingSecret }}
{{- end }}

{{- define "moe-cluster.tlsSecret" -}}
{{- if .Values.tls.secretName }}
{{- .Values.tls.secretName }}
{{- else if .Values.tls.certManager.enabled }}
{{- printf "%s-tls" (include "moe-cluster.fullname" .) }}
{{- end }}
{{- end }}

{{/* A pod's end: the hook waits, then Ray drains the node for at most so long, then its processes stop. */}}
{{- define "moe-cluster.drainSeconds" -}}
{{- add .Values.termination.moveSeconds (ceil .Values.cluster.drain_timeout_s) }}
{{- end }}

{{/* The head's hook waits until the other pods have drained: it has Ray's and Serve's controllers. In: root, isHead. */}}
{{- define "moe-cluster.hookSeconds" -}}
{{- add .root.Values.termination.endpointSeconds (ternary (include "moe-cluster.drainSeconds" .root) 0 .isHead) }}
{{- end }}

{{- define "moe-cluster.graceSeconds" -}}
{{- add .Values.termination.endpointSeconds (include "moe-cluster.drainSeconds" .) .Values.termination.stopSeconds }}
{{- end }}
